"""Plain products with decoded weights: what a file is measured beside, as large and as fast as an unquantized one.

The values are those of the checkpoint, error branches folded in; nothing is packed. Weights lie as those of layers that
are not quantized, so that embeddings that are tied share one tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from rankbook.exporter.dialects.base import Dialect, LayerWriter, PackedLayer

if TYPE_CHECKING:
    from torch import Tensor


def refuse(layer: PackedLayer) -> str:
    """Return why a layer cannot be written so."""
    if layer.int8_activations:
        return "a plain product does not round its input; use --dialect rankbook or ort, or --activations float"
    return ""


def lower(writer: LayerWriter, x: ir.Value) -> list[ir.Node]:
    """Return a product and its bias, or the look-up of an embedding."""
    layer, weight = writer.layer, _weight(writer)
    if layer.embedding:
        writer.op("Gather", weight, x, axis=0)
        writer.nodes[-1].name = layer.name
        return writer.nodes
    transposed = writer.op("Transpose", weight, perm=[1, 0])
    transposed.type, transposed.shape = weight.type, ir.Shape([layer.spec.in_features, layer.spec.out_features])
    product = writer.op("MatMul", x, transposed)
    if layer.spec.bias:
        bias = writer.floats("bias", (layer.spec.out_features,), lambda: layer.read("bias"))
        writer.op("Add", product, bias)
    writer.nodes[-1].name = layer.name
    return writer.nodes


def _weight(writer: LayerWriter) -> ir.Value:
    """Return the decoded weight (N, K), which layers that share tensors share, too."""
    layer = writer.layer

    def load() -> Tensor:
        from rankbook.calibration.record.quantized_linear import QuantizedLinear

        held = {name: layer.read(name) for name in layer.spec.tensors()}
        return QuantizedLinear.unpack(held, layer.spec).weight(with_low_rank=True)

    return writer.floats("weight", (layer.spec.out_features, layer.spec.in_features), load, layer.owner)


DIALECT = Dialect("dense", "plain products with decoded weights, for comparison", refuse, lower)
