"""Each graph pass on a small graph: what it changes, what it leaves, and that the result is the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from rankbook.exporter.passes.attention import DecomposeAttention
from rankbook.exporter.passes.functions import AddBodies
from rankbook.exporter.passes.kv_cache import QuantizeCache
from rankbook.exporter.passes.masks import CheckMasks
from rankbook.exporter.passes.norms import UnifyNormTypes
from rankbook.exporter.passes.reshape import StaticReshape
from rankbook.exporter.passes.rotary import FuseRotary
from rankbook.exporter.passes.shapes import InferShapes
from tests.calibration.records import random_record
from tests.exporter.rtx import build, needs_rtx
from tests.ops.cases import op_model

HEADS, KEYS, SIZE = 4, 2, 16


def attention(dtype: str, size: int = SIZE, softcap: float = 0.0) -> ir.Model:
    """Return a model with one Attention node and a boolean mask."""
    return ir.from_onnx_text(f"""
        <ir_version: 11, opset_import: ["" : 23]>
        g ({dtype}[b,{HEADS},s,{size}] q, {dtype}[b,{KEYS},t,{size}] k, {dtype}[b,{KEYS},t,{size}] v, bool[b,1,s,t] m)
            => ({dtype}[b,{HEADS},s,{size}] y)
        {{ y = Attention <scale: float = 0.3, softcap: float = {softcap}> (q, k, v, m) }}
    """)


def run(model: ir.Model, feeds: dict[str, Any]) -> Any:
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]


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


def test_values_may_be_narrower_than_keys():
    """As in multi-head latent attention."""
    model = attention("float")
    for value in (model.graph.inputs[2], model.graph.outputs[0]):
        value.shape = ir.Shape([*list(value.shape or ())[:3], 4])
    generator = np.random.default_rng(0)
    shapes = {"q": (2, HEADS, 3, SIZE), "k": (2, KEYS, 5, SIZE), "v": (2, KEYS, 5, 4)}
    feeds: dict[str, Any] = {name: generator.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    feeds["m"] = np.ones((2, 1, 3, 5), bool)
    want = run(model, feeds)
    DecomposeAttention()(model)
    got = run(model, feeds)
    assert got.shape == want.shape == (2, HEADS, 3, 4)
    assert np.abs(got - want).max() < 1e-5


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


class Rotary(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        both = torch.cat([angles, 2 * angles if self.change == "angles" else angles], -1)
        cos, sin = both.cos().to(x.dtype).unsqueeze(1), both.sin().to(x.dtype).unsqueeze(1)
        first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        turned = torch.cat([second, first] if self.change == "sign" else [-second, first], -1)
        return x * cos + turned * sin


@pytest.mark.parametrize("change", ["", "sign", "angles"])
def test_only_the_rotary_embedding_of_llama_is_fused(change):
    x, angles = torch.randn(2, HEADS, 3, SIZE).half(), torch.randn(2, 3, SIZE // 2)
    program = torch.onnx.export(Rotary(change).eval(), (x, angles), dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    model = program.model
    feeds = {value.name or "": tensor.numpy() for value, tensor in zip(model.graph.inputs, (x, angles), strict=True)}
    want = run(model, feeds)
    FuseRotary()(model)
    assert ("RotaryEmbedding" in {node.op_type for node in model.graph}) == (change == "")
    # Half precision: two products and a sum of numbers up to 4.
    assert np.abs(run(model, feeds).astype(np.float32) - want.astype(np.float32)).max() < 1e-2


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


def test_reshapes_get_a_constant_target_where_axes_allow_it():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[b,s,8] x, int64[4] t, int64[2] u) => (float[b,s,2,4] y, float[r,2] z) {
            y = Reshape <allowzero: int = 1> (x, t)
            z = Reshape (x, u)
        }
    """)
    assert StaticReshape()(model).modified
    targets = {node.outputs[0].name: node.inputs[1].const_value for node in model.graph}  # type: ignore[union-attr]
    assert targets["y"] is not None
    assert targets["y"].numpy().tolist() == [0, 0, 2, 4]
    assert targets["z"] is not None
    assert targets["z"].numpy().tolist() == [-1, 2]
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    feeds = {"x": x, "t": np.array([2, 3, 2, 4]), "u": np.array([24, 2])}
    assert np.array_equal(run(model, feeds), x.reshape(2, 3, 2, 4))


def test_a_norm_is_computed_in_the_type_of_its_scale():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float16[b,8] x, float[8] w) => (float[b,8] y) { y = RMSNormalization <axis: int = -1> (x, w) }
    """)
    assert UnifyNormTypes()(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float16)
    wide = x.astype(np.float32)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert np.abs(run(model, {"x": x, "w": np.ones(8, np.float32)}) - want).max() < 1e-5
    assert not UnifyNormTypes()(model).modified


def test_bodies_are_added_once_and_shapes_reach_every_output():
    model = ir.from_proto(op_model(random_record(rank=2)))
    model.functions.clear()
    AddBodies()(model)
    AddBodies()(model)
    assert sorted(name for _, name, _ in model.functions) == ["CodebookMatMulLowRank3", "RankbookDequantize"]
    InferShapes()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_value_without_a_shape_is_named():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23, "other" : 1]>
        g (float[2] x) => (float[2] y) { h = other.Unknown (x)  y = Relu (h) }
    """)
    with pytest.raises(ValueError, match=r"Unknown node.*'h'"):
        InferShapes()(model)


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
