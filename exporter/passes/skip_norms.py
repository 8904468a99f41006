"""Replaces a sum and its normalization by one node.

In float32 this is ``rankbook::AddRMSNormalization``, whose body is ``com.microsoft::SkipSimplifiedLayerNormalization``;
in other types the latter itself.
"""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.passes.group_query import DOMAIN
from rankbook.exporter.rewrite import Writer, standard_nodes, take_over
from rankbook.plugins import contract, rows


class FuseSkipNorms(ir.passes.InPlacePass):
    """Makes one node with two results of ``sum = Add(a, b)`` and ``RMSNormalization(sum, scale)``.

    Fused are sums of two values of one shape whose normalization has a stored scale of the same type.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        fused = [node for node in standard_nodes(model.graph, "RMSNormalization") if _fuse(model.graph, node)]
        if fused:
            model.opset_imports[DOMAIN] = 1
            model.opset_imports[contract.DOMAIN] = contract.VERSION
        return ir.passes.PassResult(model, modified=bool(fused))


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    total, scale = norm.inputs[:2]
    add = None if total is None else total.producer()
    if total is None or scale is None or add is None or add.op_type != "Add" or scale.const_value is None:
        return False
    parts = [value for value in add.inputs if value is not None and value.shape is not None]
    same = len(parts) == 2 and parts[0].shape == parts[1].shape == total.shape
    axis = norm.attributes.get("axis")
    if not same or scale.dtype != total.dtype or (axis is not None and axis.as_int() != -1):
        return False
    attributes = {"epsilon": norm.attributes["epsilon"].as_float()}
    inputs = [*parts, scale]
    writer = Writer(graph, str(norm.name))
    if total.dtype == ir.DataType.FLOAT:
        kind, domain, count = rows.ADD_NORM.name, contract.DOMAIN, 2
    else:
        kind, domain, count = "SkipSimplifiedLayerNormalization", DOMAIN, 4
    normalized, *unused, summed = writer.node(
        kind, inputs, attributes, domain=domain, name=writer.prefix, outputs=count
    ).outputs
    for value in unused:
        value.name = ""
    take_over(norm.outputs[0], normalized)
    graph.remove(norm, safe=True)
    writer.replace(add, {total: summed})
    return True
