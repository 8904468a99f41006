"""Adds the bodies of the operators that a graph uses."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.bodies.attention import attention_function
from rankbook.exporter.bodies.codebook import functions
from rankbook.exporter.bodies.rows import row_function
from rankbook.plugins import attention_contract, contract, row_contract


class AddBodies(ir.passes.InPlacePass):
    """Appends one model-local function per operator name in the graph, so that any ONNX runtime can compute it.

    The bodies of attention and of operators on rows are nodes of ONNX Runtime's. The names of the nodes in the others
    matter, see `rankbook.exporter.functions`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        names = {node.op_type for node in model.graph if node.domain == contract.DOMAIN}
        attention, rows = names & {attention_contract.NAME}, names & set(row_contract.OPERATORS)
        protos = [*(attention_function() for _ in attention), *map(row_function, sorted(rows))]
        if packed := names - attention - rows:
            protos += functions(packed)
        for proto in protos:
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
        return ir.passes.PassResult(model, modified=True)
