"""A cache of a fixed length gets heads of a size that attention has a kernel for, and holds the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rankbook.exporter.passes.attention import DecomposeAttention
from rankbook.exporter.passes.static_cache import PadHeads, SinkSlots
from tests.exporter.passes.graphs import run

HEADS, KEYS, SLOTS, NEW = 4, 2, 8, 3


def model_of(*given: Any, **more: Any) -> ir.Model:
    """Return the model of `text_of`."""
    return ir.from_onnx_text(text_of(*given, **more))


def text_of(dtype: str, keys: int, values: int, more: str = "", scale: str = "<scale: float = 0.3>") -> str:
    """Return a model that writes keys and values of these sizes, and attends to all that are seen; ``more`` nodes."""
    past = "".join(f", {dtype}[b,{KEYS},{SLOTS},{n}] past_{x}" for x, n in (("k", keys), ("v", values)))
    new = "".join(f", {dtype}[b,{KEYS},s,{n}] new_{x}" for x, n in (("k", keys), ("v", values)))
    present = "".join(f", {dtype}[b,{KEYS},{SLOTS},{n}] present_{x}" for x, n in (("k", keys), ("v", values)))
    outputs = "".join(f", {dtype}[b,{HEADS},s,{values}] z" for _ in more[:1])
    return f"""
        <ir_version: 11, opset_import: ["" : 24]>
        g ({dtype}[b,{HEADS},s,{keys}] q, int64[b] at, bool[b,1,s,{SLOTS}] m{past}{new})
            => ({dtype}[b,{HEADS},s,{values}] y{outputs}{present})
        {{
            present_k = TensorScatter <axis: int = 2> (past_k, new_k, at)
            present_v = TensorScatter <axis: int = 2> (past_v, new_v, at)
            y = Attention {scale} (q, present_k, present_v, m)
            {more}
        }}
    """


def feeds(dtype: str, keys: int, values: int, held: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Return inputs for texts that begin, into buffers with heads of ``held`` elements."""
    kind, generator = np.float16 if dtype == "float16" else np.float32, np.random.default_rng(0)
    shapes = {"q": (2, HEADS, NEW, keys), "new_k": (2, KEYS, NEW, keys), "new_v": (2, KEYS, NEW, values)}
    found: dict[str, Any] = {name: generator.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    sizes = {"past_k": held[0] or keys, "past_v": held[1] or values}
    found |= {name: np.zeros((2, KEYS, SLOTS, size), kind) for name, size in sizes.items()}
    found["at"] = np.zeros(2, np.int64)
    found["m"] = np.broadcast_to(np.arange(SLOTS) <= np.arange(NEW)[:, None], (2, 1, NEW, SLOTS))
    return found


@pytest.mark.parametrize(
    ("keys", "values", "size"), [(16, 8, 16), (12, 12, 16), (24, 8, 32), (8, 16, 16), (192, 128, 192)]
)
def test_zeros_behind_heads_change_nothing(keys: int, values: int, size: int) -> None:
    model = model_of("float16", keys, values, scale="")
    want = run(model, feeds("float16", keys, values))
    assert PadHeads()(model).modified
    assert not DecomposeAttention()(model).modified, "it has a kernel now"
    caches = {str(value.name): value for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in ("past_k", "past_v", "present_k", "present_v"):
        assert list(caches[name].shape or ())[1:] == [KEYS, SLOTS, size]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    got = run(model, feeds("float16", keys, values, (size, size)))
    assert got.shape == want.shape == (2, HEADS, NEW, values)
    # Sums of half precision in another order.
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()


def test_values_that_are_computed_from_a_cache_are_padded_as_they_are() -> None:
    """As in DeepSeek V3, whose cache holds what keys and values are computed from."""
    model = model_of("float16", 16, 16, more="w, u = Split <axis: int = 3, num_outputs: int = 2> (present_v)")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    half = next(node for node in model.graph if node.op_type == "Split").outputs[0]
    half.type, half.shape = attention.inputs[2].type, ir.Shape(["b", KEYS, SLOTS, 8])  # type: ignore[union-attr]
    attention.replace_input_with(2, half)
    attention.outputs[0].shape = ir.Shape(["b", HEADS, "s", 8])
    model.graph.outputs.pop(1)  # the helper's second result
    model.graph.sort()
    values = feeds("float16", 16, 16)
    want = run(model, values)
    assert PadHeads()(model).modified
    assert not DecomposeAttention()(model).modified
    got = run(model, values)
    assert got.shape == want.shape == (2, HEADS, NEW, 8)
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()


def test_two_layers_that_read_one_cache() -> None:
    """As in Gemma 3n, whose last layers have no keys of their own."""
    model = model_of("float16", 16, 8, more="z = Attention <scale: float = 0.5> (q, present_k, present_v, m)")
    assert PadHeads()(model).modified
    nodes = [node for node in model.graph if node.op_type == "Attention"]
    assert [list(node.inputs[0].shape or ())[3] for node in nodes if node.inputs[0] is not None] == [16, 16]
    assert [list(node.inputs[2].shape or ())[3] for node in nodes if node.inputs[2] is not None] == [16, 16]
    assert sum(node.op_type == "Pad" for node in model.graph) == 1
    assert sum(node.op_type == "Slice" for node in model.graph) == 2


def test_sinks_are_a_slot_of_zeros_whose_score_the_mask_adds() -> None:
    """gpt-oss: the same as a term in the denominator of the softmax of each head, with one node that has a kernel."""
    text = with_sinks(text_of("float16", 16, 16))
    spelled, model = ir.from_onnx_text(text), ir.from_onnx_text(text)
    values = feeds("float16", 16, 16)
    values["sinks"] = np.array([-3.0, 0.0, 1.0, 5.0], np.float16)
    DecomposeAttention()(spelled)
    want = run(spelled, values)
    assert SinkSlots()(model).modified
    assert not DecomposeAttention()(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for name in ("past_k", "past_v"):
        values[name] = np.zeros((2, KEYS, SLOTS + 1, 16), np.float16)
    got = run(model, values)
    assert np.abs(got - want).max() < 4e-3 * np.abs(want).max()
    assert np.abs(got[:, 3]).max() < np.abs(got[:, 0]).max(), "a large sink takes the weight of the keys"


def with_sinks(text: str) -> str:
    """Return the same model with sinks in all attentions."""
    text = text.replace("= Attention", "= rankbook.trace.SinkAttention").replace(
        "present_v, m)", "present_v, m, sinks)"
    )
    text = text.replace('"" : 24', '"" : 24, "rankbook.trace" : 1')
    return text.replace(f"bool[b,1,s,{SLOTS}] m,", f"bool[b,1,s,{SLOTS}] m, float16[{HEADS}] sinks,")


@pytest.mark.parametrize(
    ("more", "value"),
    [("z = Attention <scale: float = 0.5> (q, present_k, present_v, m)", "present_v"), ("", "new_v")],
    ids=["two layers read one cache", "values of no cache"],
)
def test_sinks_stay_where_a_slot_more_would_be_wrong(more: str, value: str) -> None:
    text = with_sinks(text_of("float16", 16, 16, more)).replace("present_v, m", f"{value}, m")
    model = ir.from_onnx_text(text)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not SinkSlots()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("dtype", "keys", "values", "more", "scale"),
    [
        ("float16", 16, 16, "", ""),
        ("float", 16, 8, "", ""),
        ("float16", 272, 8, "", ""),
        ("float16", 16, 8, "", "<softcap: float = 30.0>"),
        ("float16", 16, 8, "w = Neg (present_v)  z = Attention <scale: float = 0.5> (q, present_k, w, m)", ""),
    ],
    ids=["fits already", "single precision", "too wide", "softcap", "read by something else"],
)
def test_other_caches_stay(dtype: str, keys: int, values: int, more: str, scale: str) -> None:
    model = model_of(dtype, keys, values, more, scale)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not PadHeads()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
