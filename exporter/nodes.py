"""Nodes of a ModelProto as `rankbook.plugins.merged` has them; it loads neither torch nor the exporter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankbook.plugins import merged

if TYPE_CHECKING:
    import onnx


def node_parts(node: onnx.NodeProto) -> merged.Node:
    """Return a node as its parts; strings among its attributes are decoded."""
    import onnx

    found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
    return merged.Node(node.name, node.op_type, tuple(node.input), tuple(node.output), attributes)
