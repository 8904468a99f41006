"""Replaces a sum and its normalization by one node.

In float32 this is ``rankbook::AddRMSNormalization``, whose body is ``com.microsoft::SkipSimplifiedLayerNormalization``;
in other types the latter itself.
"""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import NodePass, Writer, producer, take_over
from rankbook.plugins import rows


class FuseSkipNorms(NodePass):
    """Makes one node with two results of ``sum = Add(a, b)`` and ``RMSNormalization(sum, scale)``.

    Fused are sums of two values of one shape whose normalization has a stored scale of the same type.
    """

    kind = "RMSNormalization"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Replace a normalization and the sum before it."""
        total, scale = node.inputs[:2]
        add = producer(total, "Add")
        if total is None or scale is None or add is None or scale.const_value is None:
            return False
        parts = [value for value in add.inputs if value is not None and value.shape is not None]
        same = len(parts) == 2 and parts[0].shape == parts[1].shape == total.shape
        axis = node.attributes.get("axis")
        if not same or scale.dtype != total.dtype or (axis is not None and axis.as_int() != -1):
            return False
        writer, epsilon = Writer(graph, str(node.name)), node.attributes["epsilon"].as_float()
        stock = total.dtype != ir.DataType.FLOAT
        normalized, summed = writer.call(rows.ADD_NORM, [*parts, scale], {"epsilon": epsilon}, stock=stock)
        take_over(node.outputs[0], normalized)
        graph.remove(node, safe=True)
        writer.replace(add, {total: summed})
        return True
