"""Gives normalizations one type."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import NodePass, Writer


class UnifyNormTypes(NodePass):
    """Brings x of a normalization to the type of its scale where the two differ.

    Gemma 2 multiplies by ``1 + weight`` in float32 whatever the activations are. The standard allows it and gives the
    result the type of the scale, but its shape inference and TensorRT take that of x.
    """

    kind = "RMSNormalization"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Cast x."""
        x, scale, result = node.inputs[0], node.inputs[1], node.outputs[0]
        if x is None or scale is None or scale.dtype is None or x.dtype in (None, scale.dtype):
            return False
        writer = Writer(graph, str(node.name))
        cast = writer.op("Cast", x, like=x, to=scale.dtype)
        cast.type = result.type = ir.TensorType(scale.dtype)
        graph.insert_before(node, writer.nodes)
        node.replace_input_with(0, cast)
        return True
