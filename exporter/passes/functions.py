"""Adds the bodies of the operators that a graph uses."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.attention_body import attention_function
from rankbook.exporter.bodies import functions
from rankbook.plugins import attention_contract, contract


class AddBodies(ir.passes.InPlacePass):
    """Appends one model-local function per operator name in the graph, so that any ONNX runtime can compute it.

    The body of attention is a node of ONNX Runtime's, as the rest of such a file. The names of the nodes in the others
    matter, see `rankbook.exporter.functions`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        names = {node.op_type for node in model.graph if node.domain == contract.DOMAIN}
        attention = names & {attention_contract.NAME}
        packed = names - attention
        for proto in [*(functions(packed) if packed else ()), *(attention_function() for _ in attention)]:
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=True)
