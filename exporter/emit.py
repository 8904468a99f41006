"""Turns packed layers into the initializers of an operator, in the order and types of its contract.

Tensors are lazy: their bytes are read from the memory-mapped checkpoint when the file is written, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import contract
from rankbook.plugins.forms import TensorSpec
from rankbook.plugins.layer_spec import LayerSpec


def operator(spec: LayerSpec, kind: str = "") -> contract.Operator:
    """Return the operator that computes a layer; ``kind`` overrides the layer's own (a matmul tied to an embedding)."""
    if not kind and spec.kind == "embedding":
        kind = contract.GATHER
    if not kind:
        kind = contract.matmul_kind(low_rank=bool(spec.branch_rank), int8_activations=False)
    return contract.PACKED[contract.op_name(kind, spec.bits)]


def attributes(spec: LayerSpec) -> dict[str, int | str]:
    """Return the attributes of a layer's node."""
    values: dict[str, int | str] = {
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "offset": int(spec.has_offset),
    }
    op = contract.PACKED[contract.op_name(contract.MATMUL, spec.bits)]
    return values | {attribute.name: attribute.value for attribute in op.attributes if attribute.kind == "string"}


def initializers(
    spec: LayerSpec, op: contract.Operator, read: Callable[[str], Tensor], prefix: str
) -> dict[str, ir.TensorProtocol]:
    """Return the constants of a layer by formal name; tensors are named ``<prefix>.<formal name>``.

    Args:
        spec: The layer.
        op: Its operator.
        read: Returns a packed tensor of the layer by name (see `QuantizedLinear.pack`).
        prefix: Name of the layer that owns the tensors.
    """
    forms = replace(spec, kind="embedding" if op.kind == contract.GATHER else "linear").constants()
    tensors: dict[str, ir.TensorProtocol] = {}
    for name in op.constants():
        if name == "bias" and not spec.bias:
            tensors[name] = ir.tensor(torch.zeros(1).numpy(), name=f"{prefix}.bias")
        elif name == "levels":
            tensors[name] = ir.tensor(_levels(read(name), spec.has_offset).numpy(), name=f"{prefix}.levels")
        else:
            tensors[name] = _lazy(name, forms[name], read, f"{prefix}.{name}")
    return tensors


def from_record(record: QuantizedLinear, kind: str = "") -> dict[str, ir.TensorProtocol]:
    """Return the constants of a record in memory by formal name."""
    spec, packed = record.spec(), record.pack()
    return initializers(spec, operator(spec, kind), packed.__getitem__, "layer")


def _lazy(part: str, form: TensorSpec, read: Callable[[str], Tensor], name: str) -> ir.TensorProtocol:
    def load() -> ir.TensorProtocol:
        tensor = read(part)
        if part == "codes":
            tensor = (tensor ^ 0x80).view(torch.int8)  # the carrier of layout.to_carrier
        elif part == "bias":
            tensor = tensor.float()
        return ir.tensor(tensor.contiguous().numpy(), name=name)

    dtype = ir.DataType.from_numpy(np.dtype(form.dtype))
    return ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(form.shape), name=name)


def _levels(levels: Tensor, has_offset: bool) -> Tensor:
    """Return levels in float16 with a row of ones for the offset; exact, since integer levels need 8 bits."""
    rows = levels.to(torch.float16)
    return torch.cat([rows, rows.new_ones(1, rows.shape[1])]) if has_offset else rows
