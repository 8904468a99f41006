"""The operators of rankbook with their standard-ONNX bodies: one node a layer, whatever the method."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter import emit
from rankbook.exporter.dialects.base import Dialect, LayerWriter, PackedLayer
from rankbook.plugins import contract
from rankbook.plugins.int8 import LARGEST_GROUP


def lower(writer: LayerWriter, x: ir.Value) -> list[ir.Node]:
    """Return the node of the operator; layers that share tensors share the initializers."""
    layer = writer.layer
    kind = contract.GATHER
    if not layer.embedding:  # also where tied to one
        kind = contract.matmul_kind(low_rank=bool(layer.spec.branch_rank), int8_activations=layer.int8_activations)
    op = emit.operator(layer.spec, kind)
    tensors = emit.initializers(layer.spec, op, layer.read, layer.owner)
    constants = [writer.constant(tensors[name]) for name in op.constants()]
    writer.node(op.name, [x, *constants], emit.attributes(layer.spec), domain=contract.DOMAIN, name=layer.name)
    return writer.nodes


def refuse(layer: PackedLayer) -> str:
    """Return why a layer cannot be written so: every checkpoint can be, unless x is to be rounded."""
    if layer.int8_activations and layer.spec.group > LARGEST_GROUP:
        return (
            f"its groups of {layer.spec.group} inputs are too long for int8 activations, of which {LARGEST_GROUP} can"
            " be summed up; export with --activations float, or quantize with a smaller --group-size"
        )
    return ""


DIALECT = Dialect("rankbook", "one node of rankbook a layer, with a body in standard ONNX", refuse, lower)
