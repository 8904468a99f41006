"""What the page shows of layers: errors over the depth, the spectrum of the error, codebooks, and bytes."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.calibration.source import Kind, identify
from rankbook.tools.page.runs import Part

if TYPE_CHECKING:
    from torch import Tensor

    from rankbook.calibration.checkpoint.format import Checkpoint

LARGEST_SIDE = 8192
"""Smaller side of a matrix up to which its singular values are computed: a minute of two cores."""
LARGEST_GGUF = 1 << 30
"""Bytes of a GGUF file up to which it is opened for its weights: the library makes all of it float32."""
_SHOWN_BOOKS, _SHOWN_VALUES = 64, 200
_SIDE_PARTS = {"codes": "codes", "levels": "codebooks", "down": "error branch", "up": "error branch"}


@dataclass(frozen=True)
class LayerError:
    """One layer.

    Attributes:
        name: Dotted name of the torch module.
        error: Squared output error on the calibration data relative to the squared output, or None.
        bare: The same without the error branch; None where there is no branch, or it was not written down.
    """

    name: str
    error: float | None
    bare: float | None


@dataclass(frozen=True)
class Spectrum:
    """Singular values of what rounding changed in the weight, in falling order, relative to the weight's norm.

    Attributes:
        name: The layer.
        codes: Of the weight minus what the codes say; None where the source cannot be read.
        left: Of what is left with the branch; None without a branch or a source.
        branch: Of the error branch; None without one.
        rank: Of the branch.
    """

    name: str
    codes: Sequence[float] | None
    left: Sequence[float] | None
    branch: Sequence[float] | None
    rank: int


@dataclass(frozen=True)
class Codebooks:
    """A sample of the codebooks of a layer.

    Attributes:
        name: The layer.
        books: (at most 64, 2**b), by growing width.
        levels: (planes, 2**b): the levels that all codebooks are combined from.
        count: How many codebooks there are.
    """

    name: str
    books: Sequence[Sequence[float]]
    levels: Sequence[Sequence[float]]
    count: int


def errors(part: Part) -> list[LayerError]:
    """Return the errors that a checkpoint's manifest holds."""
    from rankbook.calibration.checkpoint.format import open_checkpoint

    noted = open_checkpoint(part.path).manifest.get("layers", {})
    entries = {name: entry if isinstance(entry, Mapping) else {} for name, entry in noted.items()}
    found = [LayerError(n, _number(e.get("error")), _number(e.get("error_without_branch"))) for n, e in entries.items()]
    return [item for item in found if item.error is not None or item.bare is not None]


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if good and math.isfinite(value) and value >= 0 else None


def by_depth(layers: Iterable[LayerError]) -> dict[str, dict[int, tuple[float | None, float | None]]]:
    """Return (error, error without the branch) by kind of layer and number of the block; of experts their means."""
    grouped: dict[str, dict[int, list[LayerError]]] = {}
    for layer in layers:
        numbers = re.findall(r"\.(\d+)\.", f".{layer.name}.")
        kind = next((part for part in reversed(layer.name.split(".")) if not part.isdigit()), layer.name)
        grouped.setdefault(kind, {}).setdefault(int(numbers[0]) if numbers else 0, []).append(layer)
    return {
        kind: {
            block: (_mean(item.error for item in held), _mean(item.bare for item in held))
            for block, held in sorted(blocks.items())
        }
        for kind, blocks in grouped.items()
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def chosen(layers: Sequence[LayerError], names: Sequence[str], count: int) -> list[str]:
    """Return the layers to look at closely: evenly from the one with the largest error to the one with the smallest."""
    known = sorted((item for item in layers if item.error is not None), key=lambda item: -(item.error or 0))
    ranked = [item.name for item in known] or list(names)
    if count <= 0 or not ranked:
        return []
    last = len(ranked) - 1
    places = [round(index * last / max(1, count - 1)) for index in range(count)]
    return [ranked[place] for place in dict.fromkeys(places)]


def codebooks(checkpoint: Checkpoint, name: str) -> Codebooks:
    """Return a sample of a layer's codebooks, evenly over rows and groups.

    Raises:
        CheckpointError: Its tensors are damaged.
    """
    record = checkpoint.record(name)
    books = record.codebooks().flatten(0, 1)
    count = int(books.shape[0])
    sample = books[:: max(1, count // _SHOWN_BOOKS)][:_SHOWN_BOOKS]
    sample = sample[(sample.amax(1) - sample.amin(1)).argsort()]
    return Codebooks(name, sample.tolist(), record.levels.float().tolist(), count)


def spectrum(checkpoint: Checkpoint, name: str, source: Tensor | None) -> Spectrum:
    """Return the singular values of a layer's error; without its source weight those of the branch alone."""
    record = checkpoint.record(name)
    branch, rank = (None, 0) if record.low_rank is None else (record.low_rank.dense(), record.low_rank.branch_rank)
    norm = float((record.weight(with_low_rank=True) if source is None else source).norm()) or 1.0
    own = None if branch is None else _singular(branch, norm)[:rank]
    if source is None:
        return Spectrum(name, None, None, own, rank)
    change = source - record.weight()
    left = None if branch is None else _singular(change - branch, norm)
    return Spectrum(name, _singular(change, norm), left, own, rank)


def _singular(matrix: Tensor, norm: float) -> list[float]:
    """Singular values by the eigenvalues of the smaller Gram matrix in float64: exact to 1e-8 of the largest."""
    import torch

    held = matrix.double()
    gram = held @ held.T if held.shape[0] <= held.shape[1] else held.T @ held
    values: list[float] = (torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0) / norm).tolist()
    return values


class SourceWeights:
    """The weights that a checkpoint was made from, read from where it says that they were.

    Attributes:
        missing: Why there are none; empty where there are.
    """

    def __init__(self, manifest: Mapping[str, Any]) -> None:
        """Look for them; only files of this machine count, and only those with the hash that the checkpoint notes."""
        self._scaled = frozenset(map(str, manifest.get("scaled_inputs", ())))
        self._modules: dict[str, Any] = {}
        noted = manifest.get("source", {})
        noted = noted if isinstance(noted, Mapping) else {}
        self._name, self._sha256 = str(noted.get("name", "")), noted.get("sha256")
        self.missing = self._reason()
        if not self.missing:
            self.missing = self._load()

    def _reason(self) -> str:
        if not self._name or not Path(self._name).exists():
            return f"the source model, {self._name or 'which is not named'}, is not on this machine"
        try:
            found = identify(self._name, (Kind.MODEL, Kind.GGUF))
        except ValueError as error:
            return str(error)
        size = found.path.stat().st_size
        if found.kind is Kind.GGUF and size > LARGEST_GGUF:
            return f"the source model, {found.path}, is a GGUF file of {size / 1e9:.1f} GB: too large for a page"
        from rankbook.calibration.model.loading import model_hash

        return "" if model_hash(self._name) == self._sha256 else f"the source model, {self._name}, is another one now"

    def _load(self) -> str:
        from rankbook.calibration.model.loading import load_model

        try:
            model, _ = load_model(self._name)
        except (ImportError, OSError, ValueError) as error:
            return f"the source model cannot be opened: {error}"
        self._modules = dict(model.named_modules())
        return ""

    def weight(self, name: str) -> Tensor | str:
        """Return the weight of a layer in float32 (N, K), or why it cannot be had."""
        if self.missing:
            return self.missing
        if name in self._scaled:
            return "its inputs were scaled before it was quantized, so that the source holds another matrix"
        weight = getattr(self._modules.get(name), "weight", None)
        if weight is None or weight.ndim != 2:
            return "the source holds no matrix of its name"
        if min(weight.shape) > LARGEST_SIDE:
            return f"its matrix of {weight.shape[0]} x {weight.shape[1]} is too large for singular values"
        found: Tensor = weight.detach().float()
        return found


def thinned(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Return numbers from 1 and values, of which those far behind are left out: a picture of few bytes."""
    if not values:
        return [], []
    places: list[int] = np.unique(np.geomspace(1, len(values), _SHOWN_VALUES).round().astype(int)).tolist()
    return places, [values[place - 1] for place in places]


def bytes_of(part: Part) -> dict[str, int]:
    """Return where the bytes of a folder's weights go, by part."""
    facts = part.found.facts
    if part.kind is Kind.ENGINE:
        weights = min(int(facts["weights_bytes"]), int(facts["engine_bytes"]))
        return {"weights": weights, "the rest of the engine": int(facts["engine_bytes"]) - weights}
    packed, total = (_checkpoint_parts if part.kind is Kind.CHECKPOINT else _onnx_parts)(part)
    return {**packed, "weights in float, headers, graph": max(0, total - sum(packed.values()))}


def _checkpoint_parts(part: Part) -> tuple[dict[str, int], int]:
    from rankbook.calibration.checkpoint.format import open_checkpoint

    found: dict[str, int] = {}
    for spec in open_checkpoint(part.path).layers.values():
        _add(found, {name: bits // 8 for name, bits in spec.stored_bits().items()})
    return found, sum(file.stat().st_size for file in part.folder.glob("*.safetensors"))


def _onnx_parts(part: Part) -> tuple[dict[str, int], int]:
    from rankbook.exporter.file import ExportedModel

    file = ExportedModel.open(part.path)
    found: dict[str, int] = {}
    seen: set[str] = set()
    for node in file.packed:
        own = {formal: tensor for formal, tensor in node.constants.items() if tensor.name not in seen}
        seen |= {tensor.name for tensor in own.values()}
        _add(found, {formal: tensor.bytes for formal, tensor in own.items() if formal != "bias"})
    return found, file.file_bytes


def _add(found: dict[str, int], sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        part = _SIDE_PARTS.get(name.partition("_")[0], "parameters of groups")
        found[part] = found.get(part, 0) + size
