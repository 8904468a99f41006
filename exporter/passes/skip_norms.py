"""Replaces a sum and its normalization by ONNX Runtime's ``com.microsoft::SkipSimplifiedLayerNormalization``."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.passes.group_query import DOMAIN


class FuseSkipNorms(ir.passes.InPlacePass):
    """Makes one node with two results of ``sum = Add(a, b)`` and ``RMSNormalization(sum, scale)``.

    Fused are sums of two values of one shape whose normalization has a stored scale of the same type.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        nodes = [node for node in model.graph if node.domain == "" and node.op_type == "RMSNormalization"]
        fused = [node for node in nodes if _fuse(model.graph, node)]
        if fused:
            model.opset_imports[DOMAIN] = 1
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
    node = ir.node(
        "SkipSimplifiedLayerNormalization", [*parts, scale], attributes, num_outputs=4, domain=DOMAIN, name=norm.name
    )
    graph.insert_before(add, [node])
    for unused in node.outputs[1:3]:
        unused.name = ""
    for new, old in ((node.outputs[3], total), (node.outputs[0], norm.outputs[0])):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.unfused"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove([norm, add], safe=True)
    return True
