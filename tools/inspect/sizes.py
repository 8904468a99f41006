"""Bytes and weights of packed layers, in operators of this project and of ONNX Runtime."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel

_CONSTANTS = slice(1, 4)
"""Inputs of MatMulNBits: codes, scales, zero points."""


def packed_size(file: ExportedModel) -> tuple[int, int]:
    """Return the bytes of the constants of packed layers, each counted once, and the number of their weights."""
    foreign = foreign_size(file.proto)
    seen: set[str] = set()
    packed, weights = foreign
    for node in file.packed:
        new = {formal: tensor for formal, tensor in node.constants.items() if tensor.name not in seen}
        seen |= {tensor.name for tensor in new.values()}
        packed += sum(tensor.bytes for tensor in new.values())
        if "codes" in new:
            sizes = [node.attributes.get(name) for name in ("out_features", "in_features")]
            if node.operator is not None and node.operator.one_of is not None:
                sizes += new["codes"].shape[:1]  # experts, stacked along an axis in front
            weights += math.prod(size if isinstance(size, int) else 0 for size in sizes)  # conform names what is wrong
    return packed, weights


def foreign_size(model: Any) -> tuple[int, int]:
    """Return the same of the MatMulNBits nodes of a ModelProto; an embedding shares the codes of the output layer."""
    from onnx import helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    packed = weights = 0
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        tensors = [constants[name] for name in list(node.input)[_CONSTANTS] if name in constants]
        packed += sum(
            math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in tensors
        )
        sizes = {item.name: item.i for item in node.attribute}
        weights += sizes["N"] * sizes["K"]
    return packed, weights
