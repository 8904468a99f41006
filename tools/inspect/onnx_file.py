"""What an exported file says about itself, read without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankbook.calibration.source import Kind, identify
from rankbook.tools.errors import UsageError


@dataclass(frozen=True)
class CustomNode:
    """One node of our domain, or one product of a node of several (`rankbook.plugins.merged`).

    Attributes:
        name: Name of the layer, which is the dotted name of the torch module it came from.
        op_type: E.g. ``CodebookMatMul3``.
        inputs: Names of its inputs.
        output: Name of its output.
        attributes: By name.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def ports(self) -> dict[str, str]:
        """Return the name of each input by the formal name of its port; empty for an operator that we do not know."""
        from rankbook.plugins import contract

        operator = contract.OPERATORS.get(self.op_type)
        return dict(zip(operator.input_names(), self.inputs, strict=False)) if operator else {}


@dataclass(frozen=True)
class Initializer:
    """Shape, element type (ONNX name, e.g. ``INT8``) and bytes of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numpy_dtype(self) -> str:
        """Element type as numpy names it."""
        return "float32" if self.dtype == "FLOAT" else self.dtype.lower()


@dataclass(frozen=True)
class OnnxFile:
    """An exported model without its weights.

    Attributes:
        path: The ``.onnx`` file.
        inputs: Shape of each graph input by name; dynamic dimensions are strings.
        outputs: The same of the outputs.
        metadata: The file's metadata properties.
        nodes: Nodes of our domain, in graph order.
        outputs_of: Output of the node that gives each packed layer's output, by the layer's name, in graph order.
        domains: Domains of the graph's nodes; the standard one is empty.
        initializers: Stored tensors by name; constants of a node of several products one by one.
        opset: Version of the standard operators.
        data_files: Names of external data files beside the graph.
    """

    path: Path
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    metadata: dict[str, str]
    nodes: tuple[CustomNode, ...]
    outputs_of: dict[str, str]
    domains: frozenset[str]
    initializers: dict[str, Initializer]
    opset: int
    data_files: tuple[str, ...]

    @property
    def dialect(self) -> str:
        """Operators in which the packed layers are written, see ``rankbook export --dialect``."""
        return self.metadata.get("rankbook.dialect", "rankbook")

    @property
    def code_bytes(self) -> dict[str, int]:
        """Bytes of the packed layers' codes by element type."""
        total: dict[str, int] = {}
        for name in self.code_tensors:
            tensor = self.initializers[name]
            total[tensor.dtype] = total.get(tensor.dtype, 0) + tensor.bytes
        return total

    @property
    def code_tensors(self) -> frozenset[str]:
        """Names of the tensors that hold codes."""
        ours = {node.ports().get("codes", "") for node in self.nodes}
        others = {f"{layer}.codes" for layer in self.outputs_of}
        return frozenset((ours | others) & set(self.initializers))

    @property
    def initializer_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(item.bytes for item in self.initializers.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of the graph and its data files on disk."""
        files = [self.path, *(self.path.parent / name for name in self.data_files)]
        return sum(file.stat().st_size for file in files)


def find_model(path: Path) -> Path:
    """Return the ``.onnx`` file that ``path`` (a file or an exported folder) means.

    Raises:
        UsageError: There is none, or more than one.
    """
    try:
        return identify(path, {Kind.ONNX}).path
    except ValueError as error:
        raise UsageError(str(error)) from None


def load_graph(path: Path) -> Any:
    """Return the ModelProto of ``path`` without external data.

    Raises:
        UsageError: It is not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"{path} is not a readable ONNX model ({error}); it is truncated or another format") from None
    if not model.graph.node:
        raise UsageError(f"{path} holds an empty graph; it is truncated or not an ONNX model: export it again")
    return model


def read(path: Path) -> OnnxFile:
    """Read an exported file or folder.

    Raises:
        UsageError: Not an ONNX model, or an external data file is missing or too short.
    """
    from rankbook.exporter.nodes import constants

    file = find_model(path)
    model = load_graph(file)
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    packed = noted_layers(metadata)
    nodes: list[CustomNode] = []
    outputs: dict[str, str] = {}
    for node in graph.node:
        ours = _custom_nodes(file, node) if _holds_weights(node) else []
        nodes += ours
        outputs |= {item.name: item.output for item in ours}
        if not ours and node.name in packed:
            outputs[node.name] = node.output[0]
    return OnnxFile(
        path=file,
        inputs={value.name: _shape(value) for value in graph.input},
        outputs={value.name: _shape(value) for value in graph.output},
        metadata=metadata,
        nodes=tuple(nodes),
        outputs_of=outputs,
        domains=frozenset(
            node.domain.removeprefix("ai.onnx") for part in (graph, *model.functions) for node in part.node
        ),
        initializers={name: _initializer(tensor) for name, tensor in constants(graph).items()},
        opset=max([item.version for item in model.opset_import if item.domain in ("", "ai.onnx")], default=0),
        data_files=_data_files(file, graph.initializer),
    )


def noted_layers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the exporter wrote about each packed layer, by name; nothing where a file does not say."""
    try:
        layers = json.loads(metadata.get("rankbook.layers", "{}"))
    except ValueError:
        return {}
    return layers if isinstance(layers, dict) else {}


def require_ours(model: OnnxFile) -> None:
    """Check that a file was written by this project.

    Raises:
        UsageError: It has neither a node of our domain nor a packed layer in another dialect.
    """
    from rankbook.plugins import contract

    if not model.outputs_of:
        raise UsageError(
            f"{model.path} has no node of domain {contract.DOMAIN!r} and no packed layers in another dialect, so it is"
            " not a file of rankbook; give one written by `rankbook export`"
        )


def require_standard(model: OnnxFile) -> None:
    """Check that TensorRT can know every operator of a file.

    Raises:
        UsageError: It has operators of another domain than the standard one and ours.
    """
    from rankbook.plugins import contract

    if foreign := sorted(model.domains - {"", contract.DOMAIN}):
        raise UsageError(
            f"{model.path} has operators of {', '.join(foreign)}, which TensorRT does not know (--dialect"
            " ort and --graph ort are for ONNX Runtime); export with --dialect rankbook or qdq and --graph standard"
        )


def _shape(value: Any) -> list[int | str]:
    tensor = value.type.tensor_type
    return [
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or f"axis{axis}"
        for axis, dimension in enumerate(tensor.shape.dim)
    ]


def _holds_weights(node: Any) -> bool:
    from rankbook.plugins import attention_contract, contract, row_contract

    others = {attention_contract.NAME, *row_contract.OPERATORS}
    return bool(node.domain == contract.DOMAIN and node.op_type not in others)


def _custom_nodes(path: Path, node: Any) -> list[CustomNode]:
    from rankbook.exporter.nodes import node_parts

    try:
        parts = node_parts(node)
    except ValueError as error:
        raise UsageError(f"{path}: {node.op_type} node {node.name!r} {error}; export it again") from None
    return [CustomNode(part.name, part.op_type, part.inputs, part.outputs[0], dict(part.attributes)) for part in parts]


def _initializer(tensor: Any) -> Initializer:
    import math

    import onnx

    dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
    bits = (
        4
        if dtype in ("INT4", "UINT4", "FLOAT4E2M1")
        else 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )
    return Initializer(tensor.name, dtype, tuple(tensor.dims), -(-math.prod(tensor.dims) * bits // 8))


def _data_files(path: Path, tensors: Sequence[Any]) -> tuple[str, ...]:
    needed: dict[str, int] = {}
    for tensor in tensors:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = {item.key: item.value for item in tensor.external_data}
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        needed[entries["location"]] = max(needed.get(entries["location"], 0), end)
    for name, end in needed.items():
        data = path.parent / name
        if not data.is_file():
            raise UsageError(f"{data} is missing; {path.name} keeps its weights there: copy both, or export again")
        if data.stat().st_size < end:
            raise UsageError(
                f"{data} has {data.stat().st_size} bytes, {path.name} needs {end}: truncated, export again"
            )
    return tuple(sorted(needed))
