"""Replaces ``gate * sigmoid(gate) * up`` by one node, ``rankbook::SwiGLU``."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import NodePass, Writer
from rankbook.plugins import rows


class FuseGates(NodePass):
    """Makes one node of Sigmoid, Mul and Mul in float32, where nothing else uses what lies between."""

    kind = "Sigmoid"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Replace the nodes around a Sigmoid."""
        gate, silu = node.inputs[0], _only_product(node.outputs[0])
        if gate is None or silu is None or _other(silu, node.outputs[0]) is not gate:
            return False
        last = _only_product(silu.outputs[0])
        up = None if last is None else _other(last, silu.outputs[0])
        if (
            last is None
            or up is None
            or gate.dtype != ir.DataType.FLOAT
            or gate.shape is None
            or gate.shape != up.shape
        ):
            return False
        writer = Writer(graph, str(last.name))
        (fused,) = writer.call(rows.SWIGLU, [gate, up])
        writer.replace(last, {last.outputs[0]: fused})
        graph.remove([silu, node], safe=True)
        return True


def _only_product(value: ir.Value) -> ir.Node | None:
    """Return the Mul that alone uses a value."""
    users = list(value.consumers())
    single = len(users) == 1 and not value.is_graph_output()
    return users[0] if single and users[0].domain == "" and users[0].op_type == "Mul" else None


def _other(product: ir.Node, factor: ir.Value) -> ir.Value | None:
    first, second = product.inputs
    return second if first is factor else first
