"""The cache in 8 bits: codes and scales, the same at once and token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rankbook.exporter.passes.kv_cache import QuantizeCache
from tests.exporter.rtx import build, needs_rtx

KEYS = 2


def cache_model(dtype: str = "float") -> ir.Model:
    """Return a graph that joins keys with those of the past and reads them."""
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[b,{KEYS},s,4] new, {dtype}[b,{KEYS},p,4] "past_key_values.0.key")
            => ({dtype}[b,{KEYS},t,4] "present.0.key", {dtype}[b,{KEYS},t,4] y) {{
            "present.0.key" = Concat <axis: int = -2> ("past_key_values.0.key", new)
            two = Constant <value = {dtype} {{2.0}}> ()
            y = Mul ("present.0.key", two)
        }}
    """)


def test_the_cache_holds_codes_and_a_scale_for_each_token_and_head():
    model = cache_model()
    assert QuantizeCache()(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [item.name for item in session.get_outputs()]
    assert names == ["present.0.key", "present.0.key_scale", "y"]
    assert [item.type for item in session.get_inputs()] == ["tensor(float)", "tensor(int8)", "tensor(float)"]
    new = np.random.default_rng(0).standard_normal((2, KEYS, 5, 4)).astype(np.float32)
    new[0, 0, 2] = 0
    empty = np.zeros((2, KEYS, 0, 4), np.int8), np.zeros((2, KEYS, 0, 1), np.float32)
    past: dict[str, Any] = {"past_key_values.0.key": empty[0], "past_key_values.0.key_scale": empty[1]}
    codes, scales, y = session.run(None, {"new": new, **past})
    peak = np.abs(new).max(-1, keepdims=True)
    assert np.allclose(scales, peak / 127, rtol=1e-6, atol=1e-29)
    assert codes.dtype == np.int8
    assert np.array_equal(np.abs(codes).max(-1, keepdims=True)[peak > 0], np.full((peak > 0).sum(), 127))
    assert np.abs(codes * scales - new).max() <= 0.5001 * scales.max()
    assert np.array_equal(y, 2 * (codes * scales))
    # Token by token gives the same cache as at once.
    for token in range(5):
        step = session.run(None, {"new": new[:, :, token : token + 1], **past})
        past = {"past_key_values.0.key": step[0], "past_key_values.0.key_scale": step[1]}
    assert np.array_equal(past["past_key_values.0.key"], codes)
    assert np.array_equal(past["past_key_values.0.key_scale"], scales)


def test_a_cache_that_is_not_one_concat_is_refused():
    model = cache_model()
    concat = next(node for node in model.graph if node.op_type == "Concat")
    concat.replace_input_with(0, concat.inputs[1])
    with pytest.raises(ValueError, match=r"past_key_values\.0\.key.*--kv float"):
        QuantizeCache()(model)


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_tensorrt_builds_the_cache_of_8_bits(dtype, tmp_path):
    model = cache_model() if dtype == "float" else ir.from_onnx_text(CACHE_HALF)
    QuantizeCache()(model)
    ir.save(model, tmp_path / "cache.onnx")
    sizes = {"new": ("s", 4), "past_key_values.0.key": ("p", 4), "past_key_values.0.key_scale": ("p", 1)}
    spans = {"s": (1, 4, 8), "p": (0, 8, 16)}
    profile = {
        name: tuple([batch, KEYS, spans[axis][i], size] for i, batch in enumerate((1, 1, 2)))
        for name, (axis, size) in sizes.items()
    }
    assert build(tmp_path / "cache.onnx", profile)["errors"] == []  # type: ignore[arg-type]


CACHE_HALF = f"""
    <ir_version: 11, opset_import: ["" : 23]>
    g (float16[b,{KEYS},s,4] new, float16[b,{KEYS},p,4] "past_key_values.0.key")
        => (float16[b,{KEYS},t,4] "present.0.key", float16[b,{KEYS},t,4] y) {{
        "present.0.key" = Concat <axis: int = -2> ("past_key_values.0.key", new)
        y = Relu ("present.0.key")
    }}
"""
