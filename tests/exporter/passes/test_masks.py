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


def twice(second: str = "both0, both0, seen", third: str = "both1, both1, seen") -> ir.Model:
    """Return two layers, of which the first has two attentions that read one cache, as in DiffLlama."""
    parts = " ".join(f'both{i} = Concat <axis = 2> ("past_key_values.{i}.key", k)' for i in (0, 1))
    pasts = ", ".join(f'float[b,2,p,16] "past_key_values.{i}.key"' for i in (0, 1))
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[b,2,s,16] q, float[b,2,s,16] k, bool[b,1,s,t] seen, {pasts})
            => (float[b,2,s,16] z, float[b,2,t,16] "present.0.key", float[b,2,t,16] "present.1.key")
        {{
            {parts} x = Attention (q, both0, both0, seen) y = Attention (x, {second}) z = Attention (y, {third})
            "present.0.key" = Identity (both0) "present.1.key" = Identity (both1)
        }}
    """)


def test_several_attentions_may_read_one_cache_if_each_has_the_mask():
    assert not CheckMasks()(twice()).modified
    with pytest.raises(ValueError, match="2 layers keep keys and values and 3 apply the mask"):
        CheckMasks()(twice(third="both0, both0, seen"))
    for change in ({"second": "both0, both0", "third": "both0, both0, seen"}, {"third": "both1, both1"}):
        model = twice(**change)
        extra = model.graph[2]
        model.graph.insert_after(extra, ir.node("Attention", extra.inputs, name="again"))
        with pytest.raises(ValueError, match="apply the mask in a known way"):
            CheckMasks()(model)


def continued(state: str = "past_state.0", conv: str = "past_conv.0") -> ir.Model:
    """Return a layer of which the recurrence continues ``state``, and the convolution ``conv``."""
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23, "rankbook.trace" : 1]>
        g (float[b,8,n] x, float[b,4,4] "past_state.0", float[b,8,4] "past_conv.0", float[b,4,4] s, float[b,8,4] c)
            => (float[b,4,4] "present_state.0", float[b,8,4] "present_conv.0", float[b,8,m] y, float[b,4,n] z)
        <int64[1] start = {{-4}}, int64[1] end = {{9223372036854775807}}, int64[1] axis = {{2}}, float[8,1,4] w>
        {{
            z, "present_state.0" = rankbook.trace.Recurrence ("{state}", x)
            both = Concat <axis = 2> ("{conv}", x)
            "present_conv.0" = Slice (both, start, end, axis)
            y = Conv <group = 8> (both, w)
        }}
    """)


def test_a_state_that_is_not_continued_is_refused():
    assert not CheckMasks()(continued()).modified
    for change in ({"state": "s"}, {"conv": "c"}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"'past_{name}.0' does not reach its output"):
            CheckMasks()(continued(**change))
    model = continued()
    conv = next(node for node in model.graph if node.op_type == "Conv")
    conv.replace_input_with(0, model.graph.inputs[0])
    with pytest.raises(ValueError, match=r"'past_conv.0' does not reach its output"):
        CheckMasks()(model)
