"""Standard ONNX: DequantizeLinear on INT4 or INT8 weights, which TensorRT fuses into its own matrix products.

Weights lie as (K, N): ONNX Runtime replaces a blocked DequantizeLinear along K with MatMulNBits only then. It quantizes
x to 8 bits there unless the session option ``session.qdq_matmulnbits_accuracy_level`` is 1, as in `rankbook.tools`.
No zero points are needed for ONNX Runtime before 1.28 (`rankbook.exporter.functions`): products follow directly.
TensorRT takes symmetric quantization only: no zero points in 4 bits, and zero ones in 8 bits.
A packed embedding stays an operator of rankbook: looked-up rows are no product, and all of it would be decoded.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.exporter.affine import AffineLayer, NotAffineError
from rankbook.exporter.dialects import rankbook
from rankbook.exporter.dialects.base import Dialect, LayerWriter, PackedLayer

_TYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}


def refuse(layer: PackedLayer) -> str:
    """Return why a layer cannot be written as symmetric INT4 or INT8."""
    if layer.embedding:
        return ""
    if layer.int8_activations:
        return "it has no operator that rounds its own input; use --dialect rankbook or ort, or --activations float"
    spec = layer.spec
    if layer.input_range is not None and not layer.symmetric_input:
        return (
            "its input is quantized asymmetrically, which TensorRT refuses; quantize with --activations static8, or use"
            " --dialect ort or rankbook"
        )
    if spec.bits not in _TYPES:
        return (
            f"it has {spec.bits} bits, and TensorRT's integers have 4 or 8; quantize with --bits 4 or 8, or use"
            " --dialect rankbook"
        )
    try:
        affine = AffineLayer.of(spec, layer.read)
        if not spec.has_offset:
            affine.scales()
    except NotAffineError as error:
        return str(error)
    half, top = 1 << (spec.bits - 1), affine.first + int(affine.recode.max())
    if spec.has_offset or affine.first != round(affine.first) or affine.first < -half or top >= half:
        return (
            "it is asymmetric (an offset or zero point per group), which TensorRT refuses; quantize with"
            " --weight-format symmetric, or use --dialect ort or rankbook"
        )
    return ""


def lower(writer: LayerWriter, x: ir.Value) -> list[ir.Node]:
    """Return DequantizeLinear and MatMul, and what error branch and bias need."""
    layer = writer.layer
    if layer.embedding:
        return rankbook.lower(writer, x)
    weight = dequantized_weight(writer)
    return writer.finish(writer.op("MatMul", x, weight), x)


def dequantized_weight(writer: LayerWriter) -> ir.Value:
    """Return the weight (K, N): per channel where a row is one group, in blocks along K otherwise."""
    spec = writer.layer.spec
    affine = AffineLayer.of(spec, writer.layer.read)

    def codes() -> Tensor:
        return (affine.integers().to(torch.int16) + int(affine.first)).to(torch.int8).T

    def scales() -> Tensor:
        # TensorRT wants positive scales; a group of zeros, or of what is nothing beside the others, has the smallest.
        limits = torch.finfo(writer.layer.dtype)
        return affine.scales().clamp_min(limits.smallest_normal * (limits.eps if limits.bits == 16 else 1)).T

    groups = spec.in_features // spec.group
    stored = writer.lazy("codes", _TYPES[spec.bits], (spec.in_features, spec.out_features), codes)
    if groups == 1:
        scale = writer.floats("scales", (spec.out_features,), lambda: scales()[0])
        return writer.op("DequantizeLinear", stored, scale, axis=1)
    scale = writer.floats("scales", (groups, spec.out_features), scales)
    return writer.op("DequantizeLinear", stored, scale, axis=0, block_size=spec.group)


DIALECT = Dialect("qdq", "symmetric INT4 / INT8 DequantizeLinear, fused by TensorRT", refuse, lower)
