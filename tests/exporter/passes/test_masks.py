"""Every layer with a cache applies the mask."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rankbook.exporter.passes.masks import CheckMasks


def masked(mask: str, layers: int = 2) -> ir.Model:
    """Return scores, 0 to ``layers``, with a mask, the softmax of them, and keys."""
    parts = [f'x{i} = {mask} (s, m) y{i} = Softmax (x{i}) "present.{i}.key" = Identity (y{i})' for i in range(layers)]
    outputs = ", ".join(f'float[b,4,n,n] "present.{i}.key"' for i in range(layers))
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23]> g (float[b,4,n,n] s, bool[b,1,n,n] seen) => ({outputs})
        <float zero = {{0.0}}, float low = {{-1e38}}> {{ m = Where (seen, zero, low) {" ".join(parts)} }}
    """)


def test_a_layer_without_the_mask_is_refused():
    assert not CheckMasks()(masked("Add")).modified
    for change in ("Mul", "Sub"):
        model = masked(change)
        with pytest.raises(ValueError, match="2 layers keep keys and values and 0 apply the mask"):
            CheckMasks()(model)
    model = masked("Add")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    softmax.replace_input_with(0, model.graph.inputs[0])
    with pytest.raises(ValueError, match="and 1 apply the mask"):
        CheckMasks()(model)
