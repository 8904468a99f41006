"""Turns packed layers into the initializers of an operator, in the order and types of its contract.

Tensors are lazy: their bytes are read from the memory-mapped checkpoint when the file is written, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.calibration.record.layer_meta import LayerMeta
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import contract

_TYPES = {torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.INT8, torch.float16: ir.DataType.FLOAT16}


def operator(meta: LayerMeta, kind: str = "") -> contract.OpContract:
    """Return the operator that computes a layer; ``kind`` overrides the layer's own (a matmul tied to an embedding)."""
    if not kind and meta.kind == "embedding":
        kind = contract.GATHER
    if not kind:
        kind = contract.matmul_kind(low_rank=bool(meta.rank), int8_activations=False)
    return contract.OPERATORS[contract.op_name(kind, meta.bits)]


def attributes(meta: LayerMeta) -> dict[str, int | str]:
    """Return the attributes of a layer's node."""
    values: dict[str, int | str] = {
        "in_features": meta.in_features,
        "out_features": meta.out_features,
        "offset": int(meta.has_offset),
    }
    op = contract.OPERATORS[contract.op_name(contract.MATMUL, meta.bits)]
    return values | {attribute.name: attribute.value for attribute in op.attributes if attribute.kind == "string"}


def initializers(
    meta: LayerMeta, op: contract.OpContract, read: Callable[[str], Tensor], prefix: str
) -> dict[str, ir.TensorProtocol]:
    """Return the constants of a layer by formal name; tensors are named ``<prefix>.<formal name>``.

    Args:
        meta: The layer.
        op: Its operator.
        read: Returns a packed tensor of the layer by name (see `QuantizedLinear.pack`).
        prefix: Name of the layer that owns the tensors.
    """
    templates = meta.template()
    tensors: dict[str, ir.TensorProtocol] = {}
    for name in op.constants():
        if name == "bias" and name not in templates:
            tensors[name] = ir.tensor(torch.zeros(1).numpy(), name=f"{prefix}.bias")
        elif name == "levels":
            tensors[name] = ir.tensor(_levels(read(name), meta.has_offset).numpy(), name=f"{prefix}.levels")
        else:
            tensors[name] = _lazy(name, templates[name], read, f"{prefix}.{name}")
    return tensors


def from_record(record: QuantizedLinear, kind: str = "") -> dict[str, ir.TensorProtocol]:
    """Return the constants of a record in memory by formal name."""
    meta, packed = LayerMeta.of(record), record.pack()
    return initializers(meta, operator(meta, kind), packed.__getitem__, "layer")


def stored_bits(tensors: Mapping[str, ir.TensorProtocol]) -> int:
    """Return the bits that constants take in the file."""
    return 8 * sum(tensor.nbytes for tensor in tensors.values())


def _lazy(part: str, template: Tensor, read: Callable[[str], Tensor], name: str) -> ir.TensorProtocol:
    dtype = ir.DataType.FLOAT if part == "bias" else _TYPES.get(template.dtype, ir.DataType.FLOAT)

    def load() -> ir.TensorProtocol:
        tensor = read(part)
        if part == "codes":
            tensor = (tensor ^ 0x80).view(torch.int8)  # the carrier of layout.to_carrier
        elif part == "bias":
            tensor = tensor.float()
        return ir.tensor(tensor.contiguous().numpy(), name=name)

    return ir.LazyTensor(load, dtype=dtype, shape=ir.Shape(template.shape), name=name)


def _levels(levels: Tensor, has_offset: bool) -> Tensor:
    """Return levels in float16 with a row of ones for the offset; exact, since integer levels need 8 bits."""
    rows = levels.to(torch.float16)
    return torch.cat([rows, rows.new_ones(1, rows.shape[1])]) if has_offset else rows
