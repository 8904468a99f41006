"""What a quantization run tells its caller while it works and when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.memory import peak_rss_bytes
from rankbook.calibration.model.adapter import Embeddings
from rankbook.calibration.model.packed_modules import PackedModule
from rankbook.calibration.record.codebooks import mxint_levels
from rankbook.calibration.record.group_params import GroupParams
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins.layer_spec import LayerSpec

Errors = tuple[float | None, float | None]
"""Relative output errors of a layer: as it is, and without its error branch."""
SKIPPED, OUTSIDE, GATE = "skipped by option", "outside the decoder blocks", "router or gate of experts"
"""Parts of the reasons in `QuantizeReport.left_alone` that are no surprise."""


@dataclass(frozen=True)
class Progress:
    """One progress message.

    Attributes:
        stage: What is being done, in a few words.
        block: Index of the block, -1 before the first.
        blocks: Number of blocks.
        fraction: Share of the whole work done, 0 to 1.
        eta_s: Seconds left, or None before there is an estimate.
        peak_rss_bytes: Peak resident memory of the process so far, memory-mapped weights included.
    """

    stage: str
    block: int
    blocks: int
    fraction: float
    eta_s: float | None
    peak_rss_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do to a model.

    Attributes:
        layers: Number of layers that will be packed.
        packed_share: Their share of the weights in the blocks.
        left_alone: Names of weights that stay as they are, with the reason.
        specs: What each layer will get; empty where only a summary was asked for.
        memory: Bytes that the run will hold, by part; the same.
        seconds: About how long its blocks will take, see `rankbook.calibration.driver.trial`; None there too.
    """

    layers: int
    packed_share: float
    left_alone: Mapping[str, str]
    specs: Mapping[str, LayerSpec] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None

    def reasons(self) -> dict[str, list[str]]:
        """Return the names of what is left alone by reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            found.setdefault(reason, []).append(name)
        return found

    def sentence(self) -> str:
        """Say in a line what is packed and what is not."""
        what = f"{self.layers} layers with {self.packed_share:.1%} of the weights in the blocks will be packed"
        each = [f"{len(names)} such as {names[0]} ({reason})" for reason, names in self.reasons().items()]
        return f"{what}; left alone: {', '.join(each)}" if each else what


@dataclass(frozen=True)
class LayerReport:
    """One packed layer.

    Attributes:
        spec: Shapes and types.
        error: Squared output error on the calibration inputs relative to the squared output, or None without inputs.
        without_branch: The same of the layer without its error branch; None where there is none.
    """

    spec: LayerSpec
    error: float | None = None
    without_branch: float | None = None

    @property
    def stored_bits(self) -> dict[str, int]:
        """Bits of each part; empty for a layer that shares another's tensors."""
        return self.spec.stored_bits()

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        entry = {"bits_per_weight": self.spec.bits_per_weight(), "stored_bits": self.stored_bits, "error": self.error}
        return entry if self.without_branch is None else {**entry, "error_without_branch": self.without_branch}


@dataclass(frozen=True)
class QuantizeReport:
    """The result of a run.

    Attributes:
        output_dir: The checkpoint.
        layers: Packed layers by full name.
        totals: Sums for ``linear``, ``embeddings`` and ``lm_head``, see `totals`; of the ``blocks`` and the whole
            ``model`` the weights that stay in float, see `in_float`.
        left_alone: Names of weights that stay as they are, with the reason.
        scaled: Names of layers whose inputs were scaled before quantization.
        few_tokens: Names of layers of experts that saw fewer tokens than they have inputs, see
            `rankbook.calibration.model.routed_inputs.RoutedInputs`.
        calibration: Where the calibration tokens came from.
        calibration_windows: Windows used and tokens of each, beside those asked for.
        seconds: Wall time of this run (of the last part, after a resume).
        resumed_at: Blocks that an earlier, interrupted run had finished.
        peak_rss_bytes: Peak resident memory of the process.
        devices: Where it was computed.
        rules: For how many layers each rule holds.
        cluster: What solved the layers in the place of this process, see
            `rankbook.calibration.driver.cluster.Cluster.about`; empty where nothing did.
    """

    output_dir: Path
    layers: Mapping[str, LayerReport]
    totals: Mapping[str, Any]
    left_alone: Mapping[str, str]
    scaled: tuple[str, ...]
    few_tokens: tuple[str, ...]
    calibration: str
    calibration_windows: Mapping[str, int]
    seconds: float
    resumed_at: int
    peak_rss_bytes: int
    devices: tuple[str, ...] = ("cpu",)
    rules: Mapping[str, int] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the linear layers."""
        return float(self.totals["linear"]["bits_per_weight"])

    @property
    def unknown(self) -> str:
        """What of the blocks stays in float without having been skipped by option; empty where nothing does."""
        found: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            if not any(expected in reason for expected in (SKIPPED, OUTSIDE, GATE)):
                found.setdefault(reason, []).append(name)
        if not found:
            return ""
        each = [f"{len(names)} such as {names[0]} ({reason})" for reason, names in found.items()]
        return (
            f"{self.totals['blocks']['float_share']:.1%} of the weights in the blocks stay in float: {', '.join(each)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        values = {**asdict(self), "output_dir": str(self.output_dir)}
        return {
            **values,
            "layers": {n: {**layer.spec.to_json(), **layer.to_json()} for n, layer in self.layers.items()},
        }


@dataclass
class Reporter:
    """Turns the position in the work into `Progress` messages.

    Attributes:
        blocks: Number of blocks.
        listener: Who is told.
        skipped: Blocks that were finished before this run; they do not count for the estimate.
    """

    blocks: int
    listener: Callable[[Progress], None] | None = None
    skipped: int = 0
    _start: float = field(default_factory=time.monotonic)

    def tell(self, stage: str, block: int, share: float = 0.0) -> None:
        """Report that ``share`` (0 to 1) of a block is done."""
        if self.listener is None:
            return
        done = max(0.0, block + share)
        work = done - self.skipped
        elapsed = time.monotonic() - self._start
        eta = elapsed / work * (self.blocks - done) if work > 0 else None
        self.listener(Progress(stage, block, self.blocks, done / self.blocks, eta, peak_rss_bytes()))

    def start(self, skipped: int) -> None:
        """Begin the estimate at a block."""
        self.skipped, self._start = skipped, time.monotonic()


def totals(layers: Mapping[str, LayerReport], others: Mapping[str, Any]) -> dict[str, Any]:
    """Sum stored bits over the linear layers of the blocks; ``others`` adds ``embeddings`` and ``lm_head``."""
    parts: dict[str, int] = {}
    for layer in layers.values():
        for part, bits in layer.stored_bits.items():
            parts[part] = parts.get(part, 0) + bits
    weights = sum(layer.spec.weights for layer in layers.values())
    stored = sum(parts.values())
    linear = {"weights": weights, "stored_bits": stored, "bits_per_weight": stored / max(weights, 1), "parts": parts}
    return {"linear": linear, **others}


def outside(found: Embeddings, layers: Mapping[str, LayerReport]) -> dict[str, Any]:
    """Return the stored bits of the embedding and, where there is one, of the output layer; packed ones by name."""
    entries = {"embeddings": _outside(*found.embedding, layers)}
    if found.head is not None:
        shared = {"name": found.head[0], "shared_with": found.embedding[0]}
        entries["lm_head"] = shared if found.tied else _outside(*found.head, layers)
    return entries


def _outside(name: str, module: Any, layers: Mapping[str, LayerReport]) -> dict[str, Any]:
    if packed := layers.get(name):
        count, bits = packed.spec.weights, sum(packed.stored_bits.values())
    else:
        count, bits = module.weight.numel(), 8 * module.weight.nbytes
    return {"name": name, "weights": count, "stored_bits": bits, "bits_per_weight": bits / count}


def in_float(modules: Iterable[nn.Module], layers: Iterable[LayerReport]) -> dict[str, Any]:
    """Return how many weights of modules stay in float besides packed layers, their share, and stored bits of all.

    Weights are the elements of parameters with two dimensions or more, each counted once.
    """
    left = {id(p): p for module in modules for p in module.parameters() if p.ndim >= 2}.values()
    own = [layer for layer in layers if not layer.spec.shared_with]
    count = sum(parameter.numel() for parameter in left)
    weights = count + sum(layer.spec.weights for layer in own)
    bits = sum(8 * parameter.nbytes for parameter in left) + sum(sum(layer.stored_bits.values()) for layer in own)
    return {
        "weights": weights,
        "float_weights": count,
        "float_share": count / weights,
        "stored_bits": bits,
        "bits_per_weight": bits / weights,
    }


def is_coarse(layer: PackedModule) -> bool:
    """Return whether 8 bits are coarse for parameters of some rows, see `GroupParams.coarse_rows`."""
    if torch.equal(layer.get_buffer("levels").cpu(), mxint_levels(layer.spec.bits)):
        return _raised_rows(QuantizedLinear.unpack(layer.packed(), layer.spec)) > 0
    return GroupParams.unpack(layer.packed(), layer.spec).coarse_rows() > 0


def _raised_rows(record: QuantizedLinear) -> int:
    """Return how many rows of MXINT have exponents above their own, see `GroupParams.powers_of_two`.

    Half of their groups or more have the lowest exponent of the panel, and mantissas without the upper half of their
    range, which the largest of a group with its own exponent is in.
    """
    exponents, groups = record.params.codes, record.params.shape[1]
    if exponents is None:
        return 0
    mantissas = record.levels[0].float().abs()[record.codes.long()].view(record.out_features, groups, -1).amax(2)
    raised = (exponents[..., 0] == -127) & (mantissas < 1 << (record.bits - 2))
    return int(((2 * raised.sum(1) >= groups) & (mantissas > 0).any(1)).sum())


def output_errors(problem: LayerProblem, record: QuantizedLinear) -> Errors:
    """Return `output_error` of a record, and without its error branch; None where there is none."""
    bare = None if record.low_rank is None else output_error(problem, record.with_low_rank(None))
    return output_error(problem, record), bare


def output_error(problem: LayerProblem, record: QuantizedLinear) -> float | None:
    """Return ``|X (W - W')^T|^2 / |X W^T|^2`` from the Gram matrix ``X^T X``; None where no input was seen."""
    weight, gram = problem.weight.float(), problem.statistics.gram
    if not problem.statistics.tokens:
        return None
    energy = float(((weight @ gram) * weight).sum())
    if energy <= 0:
        return None
    change = weight - record.weight(with_low_rank=True)
    return float(((change @ gram) * change).sum()) / energy
