"""Adds the standard-ONNX bodies of the operators that a graph uses."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.bodies import functions
from rankbook.plugins import contract


class AddBodies(ir.passes.InPlacePass):
    """Appends one model-local function per operator name in the graph, so that any ONNX runtime can compute it.

    The names of their nodes matter, see `rankbook.exporter.functions`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        names = {node.op_type for node in model.graph if node.domain == contract.DOMAIN}
        for proto in functions(names) if names else ():
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=True)
