"""ONNX Runtime's own operator for low-bit weights: ``com.microsoft::MatMulNBits``, symmetric or not.

Zero points are stored as integers of the width of the codes where all of a layer's are whole numbers, and as numbers of
the activations' type otherwise (the offsets of groups that are stored in 8 bits are seldom whole numbers).
A packed embedding stays an operator of rankbook, with its standard-ONNX body: ONNX Runtime's gather takes whole zero
points only.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.exporter.affine import AffineLayer, NotAffineError, pack_bits
from rankbook.exporter.dialects import rankbook
from rankbook.exporter.dialects.base import Dialect, LayerWriter, PackedLayer
from rankbook.plugins.contract import STOCK_DOMAIN

BITS = (2, 4, 8)
"""Widths that ONNX Runtime 1.31 computes on a CPU."""
MAX_BITS = 8
"""Width at which it takes whole zero points only."""
MIN_BLOCK, MAX_BLOCK = 16, 256
"""Its block sizes: powers of two in this range."""


def refuse(layer: PackedLayer) -> str:
    """Return why a layer cannot be written as MatMulNBits."""
    if layer.embedding:
        return ""
    if layer.spec.bits not in BITS:
        return f"it has {layer.spec.bits} bits; quantize with --bits 2, 4 or 8, or use --dialect rankbook"
    try:
        affine = AffineLayer.of(layer.spec, layer.read)
        affine.scales()
    except NotAffineError as error:
        return str(error)
    if layer.spec.bits == MAX_BITS and layer.spec.has_offset and not _whole(affine.zeros(), MAX_BITS):
        return (
            "it has 8 bits and zero points that are not whole numbers, which ONNX Runtime does not compute on a CPU;"
            " quantize with --weight-format symmetric (an output layer with --quantize-lm-head 4), or use --dialect"
            " rankbook"
        )
    return ""


def block_size(group: int, in_features: int) -> int:
    """Return the largest block that groups can be cut into; blocks of one group repeat its scale.

    Group sizes are multiples of 16, or the whole row, which blocks of any size cover since the last one is padded.
    """
    if group == in_features and group % MIN_BLOCK:
        return MAX_BLOCK if in_features > MAX_BLOCK // 2 else MIN_BLOCK
    size = MIN_BLOCK
    while size < MAX_BLOCK and group % (2 * size) == 0:
        size *= 2
    return size


def lower(writer: LayerWriter, x: ir.Value) -> list[ir.Node]:
    """Return MatMulNBits, and what error branch and bias need."""
    layer, spec = writer.layer, writer.layer.spec
    if layer.embedding:
        return rankbook.lower(writer, x)
    affine = AffineLayer.of(spec, layer.read)
    size = block_size(spec.group, spec.in_features)
    blocks = -(-spec.in_features // size)
    rows = spec.out_features

    def per_block(values: Tensor) -> Tensor:
        repeats = blocks if values.shape[1] == 1 else spec.group // size
        return values.repeat_interleave(repeats, 1)

    def codes() -> Tensor:
        padded = torch.nn.functional.pad(affine.integers(), (0, blocks * size - spec.in_features))
        return pack_bits(padded, spec.bits).reshape(rows, blocks, -1)

    shape = (rows, blocks, size * spec.bits // 8)
    inputs = [
        x,
        writer.lazy("codes", ir.DataType.UINT8, shape, codes),
        writer.floats("scales", (rows, blocks), lambda: per_block(affine.scales())),
    ]
    if spec.has_offset or affine.first != -(1 << (spec.bits - 1)):
        inputs.append(_zero_points(writer, lambda: per_block(affine.zeros()), (rows, blocks)))
    attributes = {
        "K": spec.in_features,
        "N": rows,
        "bits": spec.bits,
        "block_size": size,
        # 1: x stays what it is. 4: ONNX Runtime rounds it to 8 bits, with one scale per token and block.
        "accuracy_level": 4 if layer.int8_activations else 1,
    }
    product = writer.node("MatMulNBits", inputs, attributes, domain=STOCK_DOMAIN).outputs[0]
    product.type = x.type  # ONNX itself does not know the operator, so nothing infers these
    product.shape = None if x.shape is None else ir.Shape([*x.shape.dims[:-1], rows])
    return writer.finish(product, x)


def _zero_points(writer: LayerWriter, load: Callable[[], Tensor], shape: tuple[int, int]) -> ir.Value:
    """Return zero points (N, blocks): packed integers if all are whole, numbers otherwise."""
    bits = writer.layer.spec.bits
    per_byte = 8 // bits
    if _whole(load(), bits):
        packed = (shape[0], -(-shape[1] // per_byte))
        return writer.lazy(
            "zero_points",
            ir.DataType.UINT8,
            packed,
            lambda: pack_bits(torch.nn.functional.pad(load().to(torch.uint8), (0, -shape[1] % per_byte)), bits),
        )
    return writer.floats("zero_points", shape, load)


def _whole(zeros: Tensor, bits: int) -> bool:
    """Return whether zero points are integers of ``bits``."""
    return bool((zeros == zeros.round()).all() and (zeros >= 0).all() and (zeros < 1 << bits).all())


DIALECT = Dialect("ort", "MatMulNBits of ONNX Runtime", refuse, lower)
