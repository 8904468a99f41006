"""Our own operators with their standard-ONNX bodies: one node a layer, whatever the method."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter import emit
from rankbook.exporter.dialects.base import Dialect, NodeWriter, PackedLayer
from rankbook.plugins import contract


def lower(writer: NodeWriter, x: ir.Value) -> list[ir.Node]:
    """Return the node of the operator; layers that share tensors share the initializers."""
    layer = writer.layer
    kind = contract.GATHER
    if not layer.embedding:
        kind = contract.MATMUL_LOW_RANK if layer.meta.rank else contract.MATMUL  # also where tied to an embedding
    op = emit.operator(layer.meta, kind)
    tensors = emit.initializers(layer.meta, op, layer.read, layer.owner)
    constants = [writer.constant(tensors[name]) for name in op.constants()]
    writer.op(op.name, [x, *constants], emit.attributes(layer.meta), domain=contract.DOMAIN, name=layer.name)
    return writer.nodes


def refuse(layer: PackedLayer) -> str:
    """Every checkpoint can be written so."""
    del layer
    return ""


DIALECT = Dialect("rankbook", "one node of ours a layer, with a body in standard ONNX", refuse, lower)
