"""Writes new keys and values into a cache of a fixed length with TensorScatter, and says which opset has it."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import TRACE_DOMAIN, Writer
from rankbook.exporter.static import SCATTER

SCATTER_OPSET = 24
"""First version of the standard operators with TensorScatter; those of 23 that are used here only got more types."""


class ScatterCache(ir.passes.InPlacePass):
    """Replaces the placeholders of `rankbook.exporter.static` by TensorScatter along the slots.

    Past and present may then be one buffer (ONNX Runtime and TensorRT write in place). Inputs that nothing reads are
    left out: with the logits of all positions, the lengths of the rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        graph = model.graph
        for node in [node for node in graph if (node.domain, node.op_type) == (TRACE_DOMAIN, SCATTER)]:
            writer = Writer(graph, str(node.outputs[0].name))
            written = writer.op("TensorScatter", *node.inputs, axis=2, mode="linear")
            writer.replace(node, {node.outputs[0]: written})
        rows = [value for value in graph.inputs if value.name in ("write_indices", "lengths")]
        for value in [value for value in rows if not value.consumers()]:
            graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=True)


class RaiseOpset(ir.passes.InPlacePass):
    """Declares `SCATTER_OPSET` in the model and in its functions, which must agree."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
            imports[""] = SCATTER_OPSET
        return ir.passes.PassResult(model, modified=True)
