"""Finished blocks of a run on disk, so that an interrupted run goes on where it stopped, with an identical result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankbook.calibration.checkpoint.files import sha256_file, write_text_atomic
from rankbook.calibration.checkpoint.integrity import read_layers
from rankbook.calibration.driver.allocation import Choice
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.model.packed_modules import CodebookLinear
from rankbook.calibration.schema import mismatch, read_object
from rankbook.calibration.versions import versions

_STATE, _TOKENS, _CHOICES = "state.json", "tokens.safetensors", "choices.json"


@dataclass(frozen=True)
class BlockResult:
    """One finished block.

    Attributes:
        layers: Packed layers by full name.
        errors: Relative output errors by full layer name.
        tensors: New values of other parameters of the block by full name (norms that carry an input scaling).
        scaled: Full names of the layers whose inputs are scaled.
        few_tokens: Full names of the layers of experts with shared statistics.
        without_branch: The errors of layers with an error branch, without it.
    """

    layers: Mapping[str, CodebookLinear]
    errors: Mapping[str, float | None]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scaled: Sequence[str] = ()
    few_tokens: Sequence[str] = ()
    without_branch: Mapping[str, float] = field(default_factory=dict)


class PartialState:
    """The folder ``.<output>.partial`` beside the output: what an interrupted run has finished."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], *, resume: bool) -> None:
        """Open the state of an interrupted run, or begin a new one.

        Args:
            output: The folder of the final result.
            fingerprint: Everything that shapes the result: options, hashes of model and text, versions.
            resume: Keep what is there; without it, an earlier state is removed.

        Raises:
            ValueError: ``resume`` with another fingerprint; the message names what differs.
        """
        output = output.absolute()
        self.folder = output.with_name(f".{output.name}.partial")
        if not resume and self.folder.exists():
            shutil.rmtree(self.folder)
        if (self.folder / _STATE).is_file():
            _compare(_read_state(self.folder / _STATE), json.loads(json.dumps(fingerprint)), self.folder)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.folder / _STATE, json.dumps(fingerprint, indent=1))

    def finished(self) -> int:
        """Return how many blocks are finished, counted from the first."""
        count = 0
        while self.holds(count):
            count += 1
        return count

    def holds(self, index: int) -> bool:
        """Return whether a block is finished."""
        return self._path(index).is_file()

    def save(self, index: int, result: BlockResult) -> None:
        """Store a finished block; a reader never sees half of one."""
        tensors = {f"{name}.{part}": t for name, layer in result.layers.items() for part, t in layer.packed().items()}
        layers = {name: layer.spec.to_json() for name, layer in result.layers.items()}
        others = {
            "tensors": list(result.tensors),
            "scaled": list(result.scaled),
            "few_tokens": list(result.few_tokens),
            "without_branch": dict(result.without_branch),
        }
        metadata = {
            "layers": json.dumps(layers),
            "errors": json.dumps(dict(result.errors), allow_nan=False),
            "others": json.dumps(others),
        }
        tensors |= {name: tensor.contiguous() for name, tensor in result.tensors.items()}
        self._write(self._path(index), tensors, metadata)

    def load(self, index: int) -> BlockResult:
        """Return a finished block.

        Raises:
            ValueError: Its file is damaged.
        """
        with _reading(self._path(index)) as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
            return _block(tensors, stream.metadata())

    def tokens(self) -> tuple[Tensor, str] | None:
        """Return the calibration tokens (sequences, length) of the interrupted run and their description, if stored.

        Raises:
            ValueError: Their file is damaged.
        """
        path = self.folder / _TOKENS
        if not path.is_file():
            return None
        with _reading(path) as stream:
            return stream.get_tensor("tokens").long(), str(stream.metadata()["description"])

    def save_tokens(self, tokens: Tensor, description: str) -> None:
        """Store the calibration tokens."""
        self._write(self.folder / _TOKENS, {"tokens": tokens.to(torch.int32)}, {"description": description})

    def choices(self) -> dict[str, Choice] | None:
        """Return what the interrupted run chose for the layers within a budget, if it is stored.

        Raises:
            ValueError: Its file is damaged.
        """
        path = self.folder / _CHOICES
        if not path.is_file():
            return None
        found = read_object(path, "start again without --resume")
        try:
            if wrong := mismatch(found, dict[str, Choice], "choices"):
                raise TypeError(wrong)
            return {name: Choice(**entry) for name, entry in found.items()}
        except TypeError as error:
            raise ValueError(f"{path} is damaged ({error}); start again without --resume") from error

    def save_choices(self, choices: Mapping[str, Choice]) -> None:
        """Store what was chosen for the layers: made anew on another number of threads it might be something else."""
        write_text_atomic(self.folder / _CHOICES, json.dumps({name: asdict(item) for name, item in choices.items()}))

    def remove(self) -> None:
        """Remove the folder: the result is complete."""
        shutil.rmtree(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        temporary = path.with_suffix(".tmp")
        try:
            save_file(dict(tensors), temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"writing {path} failed ({error}); free some space and go on with --resume") from error
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)


@dataclass(frozen=True)
class _Others:
    """Types of what else is in a file's metadata."""

    tensors: list[str]
    scaled: list[str]
    few_tokens: list[str]
    without_branch: dict[str, float]


def fingerprint(options: QuantizeOptions, digest: str) -> dict[str, Any]:
    """Return everything that shapes the result; a run is resumed only with the same.

    Args:
        options: Of the run.
        digest: Of the model, see `rankbook.calibration.model.loading.model_hash`.
    """
    text = _text_hash(options)
    return {"options": options.shaping(), "model": digest, "calibration": text, "versions": versions()}


def _text_hash(options: QuantizeOptions) -> str:
    if options.calib is None:
        return "sampled from the model"
    path = Path(options.calib)
    return sha256_file(path) if path.is_file() else hashlib.sha256(options.calib.encode()).hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a file of the state; whatever is wrong with its content is one sentence."""
    try:
        with safe_open(path, framework="pt") as stream:
            yield stream
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start again without --resume") from error


def _block(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> BlockResult:
    layers = {}
    for name, spec in read_layers(json.loads(metadata["layers"]), "the list of layers").items():
        layers[name] = CodebookLinear(spec, {part: tensors[f"{name}.{part}"] for part in spec.tensors()})
    errors, others = json.loads(metadata["errors"]), json.loads(metadata["others"])
    wrong = mismatch(errors, dict[str, float | None], "errors") or mismatch(others, _Others, "others")
    if wrong:
        raise ValueError(wrong)
    changed = {name: tensors[name] for name in others["tensors"]}
    bare = others.get("without_branch", {})
    return BlockResult(layers, errors, changed, others["scaled"], others["few_tokens"], bare)


def _read_state(path: Path) -> dict[str, Any]:
    return read_object(path, "start again without --resume")


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    a, b = _flatten(before), _flatten(now)
    different = [
        f"{key} was {a.get(key)!r}, now {b.get(key)!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]
    if different:
        raise ValueError(
            f"the interrupted run in {folder} cannot go on: {'; '.join(different)}. Give the same model and options,"
            " or start again without --resume"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
