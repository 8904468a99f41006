"""Attention is spelled out where TensorRT has no kernel, and computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rankbook.exporter.passes.attention import DecomposeAttention
from tests.exporter.passes.graphs import run

HEADS, KEYS, SIZE = 4, 2, 16


def attention(dtype: str, size: int = SIZE, softcap: float = 0.0) -> ir.Model:
    """Return a model with one Attention node and a boolean mask."""
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23]>
        g ({dtype}[b,{HEADS},s,{size}] q, {dtype}[b,{KEYS},t,{size}] k, {dtype}[b,{KEYS},t,{size}] v, bool[b,1,s,t] m)
            => ({dtype}[b,{HEADS},s,{size}] y)
        {{ y = Attention <scale: float = 0.3, softcap: float = {softcap}> (q, k, v, m) }}
    """)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_spelled_out_attention_is_the_same(softcap):
    generator = np.random.default_rng(0)
    shapes = {"q": (2, HEADS, 3, SIZE), "k": (2, KEYS, 5, SIZE), "v": (2, KEYS, 5, SIZE)}
    feeds: dict[str, Any] = {name: generator.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    feeds["m"] = generator.random((2, 1, 3, 5)) < 0.5
    feeds["m"][..., 0] = True
    model = attention("float", softcap=softcap)
    want = run(model, feeds)
    assert DecomposeAttention()(model).modified
    assert "Attention" not in {node.op_type for node in model.graph}
    # float32 with sums in another order.
    assert np.abs(run(model, feeds) - want).max() < 1e-5


def test_sinks_are_terms_of_the_softmax_without_a_value():
    """gpt-oss: softmax over the scores of the keys and of one sink of the head; keys 0 and 1 are seen."""
    model = ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23, "rankbook.trace" : 1]>
        g (float[b,{HEADS},s,{SIZE}] q, float[b,{KEYS},t,{SIZE}] k, float[b,{KEYS},t,{SIZE}] v, bool[b,1,s,t] m,
           float[{HEADS}] sinks) => (float[b,{HEADS},s,{SIZE}] y)
        {{ y = rankbook.trace.SinkAttention <scale: float = 0.3, softcap: float = 0.0> (q, k, v, m, sinks) }}
    """)
    generator = np.random.default_rng(0)
    shapes = {"q": (2, HEADS, 1, SIZE), "k": (2, KEYS, 5, SIZE), "v": (2, KEYS, 5, SIZE), "sinks": (HEADS,)}
    feeds: dict[str, Any] = {name: generator.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    feeds["m"] = np.arange(5)[None, None, None] < np.full((2, 1, 1, 1), 2)
    DecomposeAttention()(model)
    keys, values = (feeds[name].repeat(HEADS // KEYS, 1)[:, :, :2] for name in ("k", "v"))
    terms = np.exp(0.3 * feeds["q"] @ keys.transpose(0, 1, 3, 2))
    want = terms @ values / (terms.sum(-1, keepdims=True) + np.exp(feeds["sinks"])[:, None, None])
    assert np.abs(run(model, feeds) - want).max() < 1e-5


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_values_may_be_narrower_than_keys(dtype):
    """As in multi-head latent attention, of which TensorRT's parser says that both must have one shape."""
    model = attention(dtype)
    for value in (model.graph.inputs[2], model.graph.outputs[0]):
        value.shape = ir.Shape([*list(value.shape or ())[:3], 4])
    kind = np.float32 if dtype == "float" else np.float16
    generator = np.random.default_rng(0)
    shapes = {"q": (2, HEADS, 3, SIZE), "k": (2, KEYS, 5, SIZE), "v": (2, KEYS, 5, 4)}
    feeds: dict[str, Any] = {name: generator.standard_normal(s).astype(kind) for name, s in shapes.items()}
    feeds["m"] = np.ones((2, 1, 3, 5), bool)
    want = run(model, feeds)
    DecomposeAttention()(model)
    assert "Attention" not in {node.op_type for node in model.graph}
    got = run(model, feeds)
    assert got.shape == want.shape == (2, HEADS, 3, 4)
    assert np.abs(got - want).max() < (1e-5 if dtype == "float" else 1e-2)


@pytest.mark.parametrize(
    ("dtype", "size", "softcap", "kept"),
    [
        ("float16", 64, 0.0, True),
        ("bfloat16", 128, 0.0, True),
        ("float", 64, 0.0, False),
        ("float16", 12, 0.0, False),
        ("float16", 64, 30.0, False),
    ],
)
def test_attention_stays_where_tensorrt_has_a_kernel(dtype, size, softcap, kept):
    model = attention(dtype, size, softcap)
    DecomposeAttention()(model)
    assert ("Attention" in {node.op_type for node in model.graph}) == kept
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
