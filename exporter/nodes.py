"""Nodes and constants of a ModelProto, products of merged nodes one by one; it loads neither torch nor the exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankbook.plugins import contract, merged

if TYPE_CHECKING:
    import onnx


def node_parts(node: onnx.NodeProto) -> tuple[merged.Node, ...]:
    """Return a node, or the products that it stands for (`rankbook.plugins.merged`); strings are decoded.

    Raises:
        ValueError: It is a damaged node of several products; the message says what is wrong.
    """
    import onnx

    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    return merged.split(merged.Node(node.name, node.op_type, tuple(node.input), tuple(node.output), attributes))


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the constants of a graph by name, those of merged nodes one by one instead of the tensor that holds them.

    Nothing is read from data files. Damaged nodes, and attributes that are no tensors, count as having none.
    """
    import onnx

    stored = {tensor.name: tensor for tensor in graph.initializer}
    found: dict[str, onnx.TensorProto] = {}
    held: set[str] = set()
    for node in graph.node:
        if node.domain != contract.DOMAIN or node.op_type not in merged.OPERATORS:
            continue
        try:
            parts = [item for part in node_parts(node) for item in part.constants.items()]
        except ValueError:
            continue
        for name, value in parts:
            if isinstance(value, merged.Part) and value.data in stored:
                found[name] = _cut(stored[value.data], name, value)
                held.add(value.data)
            elif isinstance(value, onnx.TensorProto):
                found[name] = onnx.TensorProto()
                found[name].CopyFrom(value)
                found[name].name = name
    return {name: tensor for name, tensor in stored.items() if name not in held} | found


def _cut(data: onnx.TensorProto, name: str, part: merged.Part) -> onnx.TensorProto:
    """Return a part of the tensor of a node as a tensor of its own."""
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=data.data_type, dims=part.shape)
    if data.data_location != onnx.TensorProto.EXTERNAL:
        tensor.raw_data = onnx.numpy_helper.to_array(data).tobytes()[part.start : part.end]
        return tensor
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {item.key: item.value for item in data.external_data}
    entries["offset"] = str(int(entries.get("offset", 0)) + part.start)
    entries["length"] = str(part.end - part.start)
    for key, value in entries.items():
        if key != "checksum":
            tensor.external_data.add(key=key, value=value)
    return tensor
