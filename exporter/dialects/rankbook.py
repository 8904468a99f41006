"""The operators of rankbook with their standard-ONNX bodies: one node a layer, whatever the method.

Constants are in the order and types of the operator's contract. They are lazy: their bytes are read from the
memory-mapped checkpoint when the file is written, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.exporter.dialects.base import Dialect, LayerWriter, PackedLayer
from rankbook.exporter.rewrite import lazy_tensor
from rankbook.plugins import contract, experts
from rankbook.plugins.contract import Operator
from rankbook.plugins.forms import TensorSpec
from rankbook.plugins.int8 import LARGEST_GROUP
from rankbook.plugins.layer_spec import LayerSpec
from rankbook.plugins.operators import OPERATORS


def lower(writer: LayerWriter, x: ir.Value) -> list[ir.Node]:
    """Return the node of the operator; layers that share tensors share the initializers."""
    return _node(writer, _operator(writer.layer), x)


def lower_experts(writer: LayerWriter, x: ir.Value, numbers: ir.Value) -> list[ir.Node]:
    """Return the node of the operator of all experts of a matrix."""
    return _node(writer, OPERATORS[experts.name_of(_operator(writer.layer))], x, numbers)


def _operator(layer: PackedLayer) -> Operator:
    kind = contract.GATHER
    if not layer.embedding:  # also where tied to one
        kind = contract.matmul_kind(low_rank=bool(layer.spec.branch_rank), int8_activations=layer.int8_activations)
    return contract.PACKED[contract.op_name(kind, layer.spec.bits)]


def _node(writer: LayerWriter, operator: Operator, *inputs: ir.Value) -> list[ir.Node]:
    layer = writer.layer
    tensors = initializers(layer.spec, operator, layer.read, layer.owner, layer.experts)
    known = attributes(layer.spec)
    constants = map(writer.constant, tensors.values())
    writer.call(operator, [*inputs, *constants], {item.name: known[item.name] for item in operator.attributes})
    return writer.nodes


def refuse(layer: PackedLayer) -> str:
    """Return why a layer cannot be written so: every checkpoint can be, unless x is to be rounded."""
    if layer.int8_activations and layer.spec.group > LARGEST_GROUP:
        return (
            f"its groups of {layer.spec.group} inputs are too long for int8 activations, of which {LARGEST_GROUP} can"
            " be summed up; export with --activations float, or quantize with a smaller --group-size"
        )
    return ""


def attributes(spec: LayerSpec) -> dict[str, int | str]:
    """Return the attributes of a layer's node."""
    operator = contract.PACKED[contract.op_name(contract.MATMUL, spec.bits)]
    values: dict[str, int | str] = {item.name: item.value for item in operator.attributes if item.kind == "string"}
    return {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "offset": int(spec.has_offset),
        **values,
    }


def initializers(
    spec: LayerSpec, operator: contract.Operator, read: Callable[[str], Tensor], prefix: str, experts: int = 0
) -> dict[str, ir.TensorProtocol]:
    """Return the constants of a layer by formal name; tensors are named ``<prefix>.<formal name>``.

    Args:
        spec: The layer.
        operator: Its operator.
        read: Returns a packed tensor of the layer by name (see `QuantizedLinear.pack`).
        prefix: Name of the layer that owns the tensors.
        experts: How many such layers are stacked in what is read; 0 where it is one layer.
    """
    lead = (experts,) if experts else ()
    forms = replace(spec, kind="embedding" if operator.kind == contract.GATHER else "linear").constants()
    tensors: dict[str, ir.TensorProtocol] = {}
    for name in operator.constants():
        if name == "bias" and not spec.bias:
            tensors[name] = ir.tensor(torch.zeros(*lead, 1).numpy(), name=f"{prefix}.bias")
        elif name == "levels":
            tensors[name] = ir.tensor(_levels(read(name), spec.has_offset).numpy(), name=f"{prefix}.levels")
        else:
            form = replace(forms[name], shape=(*lead, *forms[name].shape))
            tensors[name] = _lazy(name, form, read, f"{prefix}.{name}")
    return tensors


def _lazy(part: str, form: TensorSpec, read: Callable[[str], Tensor], name: str) -> ir.TensorProtocol:
    def load() -> Tensor:
        tensor = read(part)
        if part == "codes":
            tensor = (tensor ^ 0x80).view(torch.int8)  # the carrier of layout.to_carrier
        return tensor.float() if part == "bias" else tensor

    return lazy_tensor(name, ir.DataType.from_numpy(np.dtype(form.dtype)), form.shape, load)


def _levels(levels: Tensor, has_offset: bool) -> Tensor:
    """Return levels in float16 with a row of ones for the offset; exact, since integer levels need 8 bits."""
    rows = levels.to(torch.float16)
    return torch.cat([rows, torch.ones_like(rows[..., :1, :])], -2) if has_offset else rows


DIALECT = Dialect(
    "rankbook", "one node of rankbook a layer, with a body in standard ONNX", refuse, lower, lower_experts
)
