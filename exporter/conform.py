"""Checks the nodes of our domain in a model against their contracts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from rankbook.exporter.dialects import NATIVE
from rankbook.exporter.nodes import constants, node_parts
from rankbook.exporter.passes.metadata import DIALECT as DIALECT_KEY
from rankbook.exporter.passes.metadata import LAYERS
from rankbook.plugins import attention_contract, contract, forms, merged, row_contract
from rankbook.plugins.layer_spec import LayerSpec

_MAX_LISTED = 100


def check_model(path: str | Path) -> list[str]:
    """Return the problems of the model at ``path``, each naming its node and port; an empty list if there are none.

    Reads the graph only, not the data file (whose presence and size are checked).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.onnx"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        return [f"{path} does not exist; give a file or folder written by 'rankbook export'"]
    except Exception as error:  # protobuf has several error types, which differ between its versions
        return [f"{path} is not a readable ONNX model ({error}); it is truncated or another format: export it again"]
    return [*check_proto(model), *_check_data(model, path)][:_MAX_LISTED]


def check_proto(model: onnx.ModelProto) -> list[str]:
    """Return the problems of a model in memory."""
    nodes = [node for node in model.graph.node if node.domain == contract.DOMAIN]
    noted = {entry.key: entry.value for entry in model.metadata_props}
    if noted.get(DIALECT_KEY, NATIVE) != NATIVE:
        problems = list(_check_dialect(model, noted))
        if not nodes:
            return problems
    elif not nodes:
        return [
            f"the model has no node of domain {contract.DOMAIN!r}, so it is not a file of rankbook;"
            " give one written by 'rankbook export'"
        ]
    else:
        problems = []
    problems += _check_imports(model, nodes)
    values = _Values(model)
    for node in nodes:
        where = f"{node.op_type} node {node.name or node.output[0]!r}"
        try:
            parts = node_parts(node)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        for part in parts:
            which = f" ({part.name})" if len(parts) > 1 else ""
            found = [*_check_places(part, values), *_check_node(part, values)]
            problems += [f"{where}{which}: {problem}" for problem in found]
    return problems


def _check_dialect(model: onnx.ModelProto, noted: dict[str, str]) -> Iterator[str]:
    """Check a file in operators that are not ours: every packed layer has its node."""
    names = {node.name for node in model.graph.node}
    try:
        layers = json.loads(noted.get(LAYERS, ""))
    except ValueError:
        yield f"the metadata {LAYERS} is missing or damaged; export the model again"
        return
    for layer in sorted(set(layers) - names):
        yield f"there is no node for the packed layer {layer!r}; export the model again"


class _Values:
    """Types and shapes of the values of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.initializers = constants(graph)
        self.stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}  # with several constants in one
        infos = [*graph.input, *graph.output, *graph.value_info]
        self._infos = {info.name: info.type.tensor_type for info in infos}

    def dtype(self, name: str) -> str | None:
        """Return the numpy name of an element type, or None if it is unknown."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            return _dtype(tensor.data_type)
        info = self._infos.get(name)
        return None if info is None or not info.elem_type else _dtype(info.elem_type)

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return a shape with None for dynamic sizes, or None if it is unknown."""
        tensor = self.initializers.get(name)
        if tensor is not None:
            return tuple(tensor.dims)
        info = self._infos.get(name)
        if info is None or not info.HasField("shape"):
            return None
        return tuple(size.dim_value if size.HasField("dim_value") else None for size in info.shape.dim)


def _check_imports(model: onnx.ModelProto, nodes: list[Any]) -> Iterator[str]:
    version = next((item.version for item in model.opset_import if item.domain == contract.DOMAIN), None)
    if version != contract.VERSION:
        yield (
            f"the model imports version {version} of domain {contract.DOMAIN!r}; this rankbook knows version"
            f" {contract.VERSION}: export the model again"
        )
    bodies = {function.name for function in model.functions if function.domain == contract.DOMAIN}
    for name in sorted({node.op_type for node in nodes} - bodies):
        yield f"the model has no function for {name}, so stock runtimes cannot run it; export it again"


def _check_node(node: merged.Node, values: _Values) -> Iterator[str]:
    if node.op_type == attention_contract.NAME:
        yield from _check_attention(node, values)
        return
    if node.op_type in row_contract.OPERATORS:
        yield from _check_rows(node)
        return
    op = contract.OPERATORS.get(node.op_type)
    if op is None:
        yield f"unknown operator; known are {', '.join(contract.OPERATORS)}"
        return
    attributes = node.attributes
    broken = [problem for wanted in op.attributes for problem in _check_attribute(wanted, attributes)]
    unknown = sorted(set(attributes) - {attribute.name for attribute in op.attributes})
    yield from broken
    if unknown:
        yield f"unknown attributes {unknown}"
    names = op.input_names()
    if len(node.inputs) != len(names) or len(node.outputs) != len(op.outputs) or not all(node.inputs):
        yield f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs; the contract asks for {names} and 'y'"
        return
    if broken:
        return
    sizes = contract.known_sizes(op.bits, attributes["out_features"], attributes["in_features"])
    ports = list(zip((*op.inputs, *op.outputs), (*node.inputs, *node.outputs), strict=True))
    if broken := [problem for port, name in ports for problem in _check_port(port, name, values, sizes)]:
        yield from broken
        return
    held = {port.name: values.initializers[name] for port, name in ports if port.constant}
    try:  # each part alone is one that is allowed; together they must be a layer
        constants = {name: forms.TensorSpec(tuple(t.dims), _dtype(t.data_type)) for name, t in held.items()}
        LayerSpec.of_constants(op.bits, attributes, constants)
    except ValueError as error:
        yield str(error)


def _check_places(node: merged.Node, values: _Values) -> Iterator[str]:
    """Check that the tensor of a merged node holds what the node says is there."""
    for name, part in node.constants.items():
        if not isinstance(part, merged.Part):
            continue
        held = values.stored.get(part.data, ())
        if len(held) != 1 or part.end > held[0]:
            yield f"{name} ends at byte {part.end} of {part.data!r}, which is {held or 'not an initializer'}"


def _check_attention(node: merged.Node, values: _Values) -> Iterator[str]:
    lowest = {**attention_contract.INT_ATTRIBUTES, **attention_contract.FLOAT_ATTRIBUTES}
    if set(node.attributes) != set(lowest):
        yield f"has attributes {sorted(node.attributes)}; the contract asks for {sorted(lowest)}"
        return
    for name, low in lowest.items():
        if node.attributes[name] < low:
            yield f"attribute {name!r} is {node.attributes[name]!r}; it must be at least {low}"
    names = [*attention_contract.INPUTS, *(attention_contract.ROTARY_INPUTS if node.attributes["do_rotary"] else ())]
    if len(node.inputs) != len(names) or not all(node.inputs):
        yield f"has {len(node.inputs)} inputs; the contract asks for {names}"
        return
    for name, value in zip(names, node.inputs, strict=True):
        if name in ("cos", "sin") and value not in values.initializers:
            yield f"port {name!r} ({value}) must be an initializer"
        if name == "past_key" and values.dtype(value) not in (None, "float32"):
            yield f"port {name!r} ({value}) is {values.dtype(value)}; allowed is float32"


def _check_rows(node: merged.Node) -> Iterator[str]:
    op = row_contract.OPERATORS[node.op_type]
    if sorted(node.attributes) != sorted(op.floats):
        yield f"has attributes {sorted(node.attributes)}; the contract asks for {sorted(op.floats)}"
    if (len(node.inputs), len(node.outputs)) != (len(op.inputs), len(op.outputs)) or not all(node.inputs):
        yield (
            f"has {len(node.inputs)} inputs and {len(node.outputs)} outputs; the contract asks for"
            f" {', '.join(op.inputs)} and {', '.join(op.outputs)}"
        )


def _check_attribute(wanted: contract.Attribute, attributes: Mapping[str, Any]) -> Iterator[str]:
    value = attributes.get(wanted.name)
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None:
        yield f"attribute {wanted.name!r} is missing"
    elif wanted.kind == "string" and value != wanted.value:
        yield f"attribute {wanted.name!r} is {value!r}; it must be {wanted.value!r}"
    elif wanted.kind == "int" and not (isinstance(value, int) and wanted.low <= value <= wanted.high):
        yield f"attribute {wanted.name!r} is {value!r}; it must be an integer in [{wanted.low}, {wanted.high}]"


def _check_port(port: contract.Port, name: str, values: _Values, sizes: dict[str, int]) -> Iterator[str]:
    """Check one port; letters that its shape binds are added to ``sizes``."""
    where = f"port {port.name!r} ({name})"
    if port.constant and name not in values.initializers:
        yield f"{where} must be an initializer, so that engines keep it packed"
        return
    dtype, shape = values.dtype(name), values.shape(name)
    if dtype is not None and dtype not in port.dtypes:
        yield f"{where} is {dtype}; allowed are {', '.join(port.dtypes)}"
    if shape is None:
        if not port.constant:
            yield f"{where} has no known shape"
        return
    if not port.constant:
        yield from _check_activation(port, where, shape, sizes)
        return
    known = tuple(size for size in shape if size is not None)
    for allowed in port.shapes:
        found = forms.match_shape(allowed, known, sizes)
        if found is not None:
            sizes |= found
            return
    yield f"{where} has shape {shape}; allowed are {_spell(port.shapes)} with {sizes}"


def _check_activation(
    port: contract.Port, where: str, shape: tuple[int | None, ...], sizes: dict[str, int]
) -> Iterator[str]:
    last = port.shapes[0][-1]
    if last == "...":
        return
    want = sizes[str(last)]
    if not shape or (shape[-1] is not None and shape[-1] != want):
        yield f"{where} has shape {shape}; its last size must be {last} = {want}"


def _check_data(model: onnx.ModelProto, path: Path) -> Iterator[str]:
    needed: dict[str, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {item.key: item.value for item in tensor.external_data}
            end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
            needed[entries["location"]] = max(needed.get(entries["location"], 0), end)
    for name, end in needed.items():
        file = path.parent / name
        if not file.is_file():
            yield f"{file} is missing; {path.name} keeps its weights there: copy both, or export again"
        elif file.stat().st_size < end:
            yield f"{file} has {file.stat().st_size} bytes, {path.name} needs {end}: truncated, export again"


def _spell(shapes: tuple[forms.Shape, ...]) -> str:
    return " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)


def _dtype(elem_type: int) -> str:
    name = onnx.TensorProto.DataType.Name(elem_type).lower()
    return "float32" if name == "float" else name
