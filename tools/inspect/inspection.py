"""What a model, a checkpoint, an exported file or an engine is made of, as one kind of report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.schema import read_object
from rankbook.calibration.source import Kind, Source, identify
from rankbook.plugins.layer_spec import LayerSpec, bits_of
from rankbook.tools.deploy.manifest import Manifest
from rankbook.tools.errors import UsageError

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel, Node

_ELEMENT_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I8": 8, "U8": 8, "BOOL": 8}

_DAMAGE = (KeyError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What reading a description raises where an entry is missing or of another type."""
_LARGEST = 5
"""Tensors in float that a report names."""


@dataclass(frozen=True)
class Layer:
    """One layer with a weight matrix.

    Attributes:
        name: Dotted name of the torch module.
        method: Quantization method, or the element type of a layer that is not quantized.
        bits: Bits of a code, or of an element.
        out_features: N.
        in_features: K.
        group: Weights of a row that share a codebook, or None.
        planes: Rank of the codebook matrix, or None.
        error_rank: Rank of the error branch, 0 without one.
        stored_bits: Stored bits per weight, side data included; 0 for a layer that shares the tensors of another.
        error: Relative output error on the calibration data, or None where it is not known.
        operator: Operator of rankbook that computes it in an exported file; one that ends in A8 rounds its input.
    """

    name: str
    method: str
    bits: int
    out_features: int
    in_features: int
    group: int | None = None
    planes: int | None = None
    error_rank: int = 0
    stored_bits: float | None = None
    error: float | None = None
    operator: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        kind: ``checkpoint``, ``onnx``, ``engine``, ``model`` or ``gguf``.
        path: Where.
        layers: Layers with a weight matrix.
        facts: Whatever else it says about itself.
    """

    kind: str
    path: str
    layers: tuple[Layer, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over all quantized layers, weights that two of them share counted once."""
        known = [layer for layer in self.layers if layer.stored_bits and layer.group is not None]
        weights = sum(layer.out_features * layer.in_features for layer in known)
        bits = sum((layer.stored_bits or 0) * layer.out_features * layer.in_features for layer in known)
        return bits / weights if weights else None


def inspect(path: str | Path, *, verify: bool = True) -> Inspection:
    """Describe whatever ``path`` is.

    >>> found = rankbook.inspect("onnx")
    >>> found.layers[0].name, found.layers[0].bits
    ('model.layers.0.self_attn.q_proj', 4)

    Args:
        path: Anything that `Kind` has.
        verify: Read the weights of a checkpoint or an exported file and compare their SHA-256 with what was written.

    Raises:
        UsageError: It is none of the things that can be described, or it is damaged.
    """
    try:
        found = identify(path, _DESCRIBE)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        if verify:
            _verify(found)
        return _DESCRIBE[found.kind](found.path.parent if found.kind is Kind.ENGINE else found.path)
    except _DAMAGE as error:
        raise UsageError(
            f"{path} is damaged or of another version: it lacks or misstates something"
            f" ({type(error).__name__}: {error!s:.200}); write it again"
        ) from error


def _verify(source: Source) -> None:
    from rankbook.calibration.checkpoint.format import open_checkpoint
    from rankbook.exporter.file import ExportedModel

    try:
        if source.kind is Kind.CHECKPOINT:
            open_checkpoint(source.path, verify=True)
        elif source.kind is Kind.ONNX:
            ExportedModel.open(source.path).verify()
    except ValueError as error:
        raise UsageError(str(error)) from None


def _checkpoint(path: Path) -> Inspection:
    from rankbook.calibration.checkpoint.format import open_checkpoint

    opened = open_checkpoint(path)
    errors = opened.manifest.get("layers", {})
    layers = [
        replace(_layer(name, spec, spec.bits_per_weight()), error=_error(errors.get(name)))
        for name, spec in opened.layers.items()
    ]
    facts = {key: value for key, value in opened.manifest.items() if key not in ("layers", "files")}
    facts["files"] = {name: entry["bytes"] for name, entry in opened.manifest.get("files", {}).items()}
    shapes = {name: shape for file in path.glob("*.safetensors") for name, _, shape in _stored(file)}
    facts["left_in_float"] = _left_in_float({name: shapes.get(name, ()) for name in opened.unquantized()}, layers)
    return Inspection("checkpoint", str(path), tuple(layers), facts)


def _left_in_float(shapes: Mapping[str, Sequence[int]], packed: Iterable[Layer]) -> dict[str, Any]:
    """Return how many weights the tensors outside of packed layers hold, their share, and those of the largest ones."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) >= 2}
    weights = sum(sizes.values())
    total = weights + sum(layer.out_features * layer.in_features for layer in packed if layer.stored_bits)
    largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:_LARGEST])
    return {"weights": weights, "share": weights / max(1, total), "largest": largest}


def _error(entry: Any) -> float | None:
    value = entry.get("error") if isinstance(entry, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _onnx(path: Path) -> Inspection:
    from rankbook.exporter.file import ExportedModel

    model = ExportedModel.open(path)
    model.require_packed()
    facts = {
        "file_bytes": model.file_bytes,
        "stored_bytes": model.stored_bytes,
        "opset": model.opset,
        "inputs": model.inputs,
        "outputs": model.outputs,
        "metadata": dict(model.metadata.properties),
    }
    noted, nodes = model.metadata.layers, {node.name: node for node in model.packed}
    layers: list[Layer] = []
    seen: set[str] = set()
    for name in model.outputs_of:
        if name not in nodes:
            layers.append(_other(model, name, noted[name]))
            continue
        codes = nodes[name].constants.get("codes")
        shared = codes is not None and codes.name in seen
        seen |= {codes.name} if codes is not None else set()
        layers += [replace(layer, stored_bits=0.0) if shared else layer for layer in _onnx_layers(model, nodes[name])]
    packed = {tensor.name for node in model.packed for tensor in node.constants.values()}
    floats = {
        name: tensor.shape
        for name, tensor in model.tensors.items()
        if "float" in tensor.dtype and name not in packed and name.rpartition(".")[0] not in model.outputs_of
    }
    # Tables of cos and sin are computed from the configuration: no weights.
    facts["left_in_float"] = _left_in_float(
        {name: shape for name, shape in floats.items() if not name.startswith("rotary.")}, layers
    )
    return Inspection("onnx", str(model.path), tuple(layers), facts)


def _other(model: ExportedModel, name: str, entry: Mapping[str, Any]) -> Layer:
    """A layer in operators of other domains: what the exporter wrote about it, and the tensors under its name."""
    held = {part: item for part, item in model.tensors.items() if part.rpartition(".")[0] == name}
    stored = sum(item.bytes for part, item in held.items() if not part.endswith(".bias"))
    try:
        spec = LayerSpec.from_json(name, {key: value for key, value in entry.items() if key != "error"})
    except ValueError as error:
        raise UsageError(f"{model.path}: {error}; export it again") from None
    return replace(_layer(name, spec, 8 * stored / spec.weights), error=_error(entry))


def _onnx_layers(model: ExportedModel, node: Node) -> list[Layer]:
    """Describe the layer of a node, or the layers of experts that it holds, by their names in the checkpoint."""
    operator = node.operator
    if operator is None:
        raise UsageError(
            f"{model.path}: node {node.name} is a {node.op_type}, an operator that this version does not know: export"
            " it again"
        )
    constants = {formal: tensor.spec for formal, tensor in node.constants.items()}
    try:
        spec, count = operator.layer(node.attributes, constants)
    except ValueError as error:
        raise UsageError(f"{model.path}: node {node.name}: {error}; export it again") from None
    stored = sum(bits_of(constants).values()) / count
    names = [node.name] if operator.one_of is None else [f"{node.name}.{expert}" for expert in range(count)]
    noted = {name: {"method": model.metadata.method, **model.metadata.layers.get(name, {})} for name in names}
    return [
        replace(
            _layer(name, spec, stored / spec.weights),
            method=str(noted[name]["method"]),
            error=_error(noted[name]),
            operator=node.op_type,
        )
        for name in names
    ]


def _layer(name: str, spec: LayerSpec, stored_bits: float) -> Layer:
    same = ("method", "bits", "out_features", "in_features", "group", "planes")
    fields = {field: getattr(spec, field) for field in same}
    return Layer(name=name, **fields, error_rank=spec.branch_rank, stored_bits=stored_bits)


def _engine(path: Path) -> Inspection:
    manifest = Manifest.read(path)
    # The layers of an engine are fused kernels; the file that it was built from says what they compute.
    layers = _onnx(manifest.source).layers if manifest.source.is_file() else ()
    return Inspection("engine", str(manifest.engine), layers, dict(manifest.facts))


def _model(path: Path) -> Inspection:
    config = read_object(path / "config.json", "copy the model again")
    stored = [tensor for file in path.glob("*.safetensors") for tensor in _stored(file)]
    layers = [_dense(name, dtype, shape) for name, dtype, shape in stored if len(shape) == 2]
    layers.sort(key=lambda layer: _natural(layer.name))
    if not layers:
        raise UsageError(f"{path} has a config.json but no readable .safetensors weights; give a complete model folder")
    facts: dict[str, Any] = {
        key: config[key] for key in ("model_type", "architectures", "hidden_size", "num_hidden_layers") if key in config
    }
    return Inspection("model", str(path), tuple(layers), facts)


def _stored(path: Path) -> list[tuple[str, str, list[int]]]:
    """Return name, type and shape of every tensor of a safetensors file; their data is not read."""
    from rankbook.calibration.checkpoint.integrity import opened

    with opened(path) as stream:
        slices = ((name, stream.get_slice(name)) for name in stream.keys())  # noqa: SIM118 (not a dict)
        return [(name, held.get_dtype(), held.get_shape()) for name, held in slices]


def _dense(name: str, dtype: str, shape: Sequence[int]) -> Layer:
    bits, (rows, columns) = _ELEMENT_BITS.get(dtype, 0), shape
    return Layer(name.removesuffix(".weight"), dtype, bits, rows, columns, stored_bits=float(bits))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _gguf(path: Path) -> Inspection:
    from importlib.util import find_spec

    from rankbook.tools.errors import MissingError

    if find_spec("gguf") is None:
        raise MissingError(f"{path} is a GGUF file and the package gguf is not installed: pip install gguf")
    import gguf

    from rankbook.calibration.model.gguf_file import read_once

    library: Any = gguf
    try:
        with read_once():
            reader = library.GGUFReader(path)
    except ValueError as error:
        raise UsageError(f"{path} is not a readable GGUF file: {error}") from None
    layers = []
    for tensor in reader.tensors:
        if len(tensor.shape) != 2:
            continue
        columns, rows = (int(size) for size in tensor.shape)
        stored = 8 * int(tensor.n_bytes) / math.prod((rows, columns))
        kind = tensor.tensor_type.name
        layers.append(Layer(tensor.name, kind, round(stored), rows, columns, stored_bits=stored))
    layers.sort(key=lambda layer: _natural(layer.name))
    return Inspection("gguf", str(path), tuple(layers), {"file_bytes": path.stat().st_size})


_DESCRIBE: dict[Kind, Callable[[Path], Inspection]] = {
    Kind.ENGINE: _engine,
    Kind.CHECKPOINT: _checkpoint,
    Kind.ONNX: _onnx,
    Kind.MODEL: _model,
    Kind.GGUF: _gguf,
}
