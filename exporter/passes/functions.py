"""Adds the bodies of the operators that a graph uses."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.bodies import functions
from rankbook.plugins import contract


class AddBodies(ir.passes.InPlacePass):
    """Appends one model-local function per operator name in the graph, so that any ONNX runtime can compute it.

    Names of the nodes in functions matter, see `rankbook.exporter.functions`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        for proto in functions(node.op_type for node in model.graph if node.domain == contract.DOMAIN):
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=True)
