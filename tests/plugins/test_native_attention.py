"""The attention operator computes what ONNX Runtime's ``GroupQueryAttention`` computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.ops.runners import built, run_in_process
from tests.plugins.attention_models import Array, Call, Node, run_in_place, session

RELATIVE = 5e-6
"""fp32 on both sides: products of up to 256 numbers and sums of up to 300 weighted values in another order, and weights
whose exponential is within 2.2e-7; relative to the largest output. Scores of up to 20 carry roundings of 2**-24 of
themselves, 1.2e-6, into the weights, on both sides."""

HALF_RELATIVE = 5e-4
"""With a cache in float16, relative to the largest output: an embedded key that lies near the middle of two float16
numbers (one of some thousand elements) may be rounded to the other one, 2**-11 of itself; measured 1.8e-4."""
HALF_STEP = 2.0**-10
"""A float16 number and its neighbour, relative to the smaller one."""

CALLS = {
    "first token": Call((1,), 1, 0),
    "one token": Call((130,), 1, 129),
    "buffer longer than the past": Call((97,), 1, 300),
    "a few tokens": Call((25,), 5, 20),
    "more tokens": Call((261,), 61, 200),
    "prompt": Call((200,), 200, 0),
    "prompt into a buffer": Call((40,), 40, 64),
    "padded prompt": Call((30, 12), 30, 0),
    "padded batch": Call((65, 4, 21), 1, 64),
}
SIZES = {
    "one head a group, 8 numbers": Node(heads=3, kv_heads=3, size=8, rotary=False),
    "more heads than a tile has rows": Node(heads=14, kv_heads=1, size=40, rotary=False),
    "five heads a group": Node(heads=10, kv_heads=2, size=72, rotary=False),
    "SmolLM2": Node(heads=9, kv_heads=3, size=64),
    "tail of a vector": Node(heads=4, kv_heads=2, size=48),
    "large heads": Node(heads=4, kv_heads=1, size=256),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 7},
    "softcap": {"softcap": 3.0, "scale": 0.5},
    "both": {"window": 50, "softcap": 30.0, "scale": 0.0},
}


def compare(node: Node, *, threads: int = 1) -> None:
    """Compare every call with ONNX Runtime's node, each with buffers of its own and in place."""
    own, stock = session(node, threads=threads), session(replace(node, own=False, body=False), native=False)
    for name, call in CALLS.items():
        feeds = call.feeds(node)
        got, want = own.run(None, feeds), stock.run(None, feeds)
        check(name, call, got, want)
        if call.past >= call.total:
            check(f"{name}, in place", call, run_in_place(own, feeds), run_in_place(stock, feeds))


def check(name: str, call: Call, got: list[Array], want: list[Array]) -> None:
    half = got[1].dtype == np.float16
    assert half == (want[1].dtype == np.float16)
    for row, keys in enumerate(call.keys):
        seen = keys if call.tokens == call.total else call.tokens  # rows of padding mean nothing
        error = np.abs(got[0][row, :seen] - want[0][row, :seen]).max() / np.abs(want[0][row, :seen]).max()
        if not error < (HALF_RELATIVE if half else RELATIVE):
            raise AssertionError(f"{name}, row {row}: {error}")
    # Keys are embedded: two products and a sum, in another order or not. Values are copied.
    found, wanted = (values[1].astype(np.float64) for values in (got, want))
    np.testing.assert_allclose(found, wanted, rtol=1.01 * HALF_STEP if half else 0, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(got[2], want[2], err_msg=name)


@built
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_node_of_onnx_runtime(size: str, kind: str) -> None:
    compare(replace(SIZES[size], **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["tail of a vector", "more heads than a tile has rows"])
def test_the_reference_is_the_node_of_onnx_runtime(size: str, kind: str) -> None:
    node = replace(SIZES[size], **KINDS[kind])
    stock = session(replace(node, own=False, body=False), native=False)
    for name, call in CALLS.items():
        feeds = call.feeds(node)
        check(name, call, list(node.expected(feeds)), stock.run(None, feeds))


@built
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """Of this processor; others fall back."""
    run_in_process(f"{__name__}:check_all", isa)


def check_all() -> None:
    for node in SIZES.values():
        compare(replace(node, **KINDS["both"]))
        compare_half(replace(node, half=True, **KINDS["both"]))


def compare_half(node: Node) -> None:
    """Compare every call of a node with a cache in float16 with the definition, which the body must meet too."""
    own, inlined = session(node), session(node, native=False)
    for name, call in CALLS.items():
        feeds = call.feeds(node)
        want = list(node.expected(feeds))
        check(name, call, own.run(None, feeds), want)
        check(f"{name}, the body", call, inlined.run(None, feeds), want)
        if call.past >= call.total:
            for buffer, past in zip(want[1:], ("past_key", "past_value"), strict=True):
                for row, before in enumerate(call.before()):  # what lies behind the new keys stays there
                    behind = before + call.tokens
                    buffer[row, :, behind:] = feeds[past][row, :, behind:]
            check(f"{name}, in place", call, run_in_place(own, feeds), want)


@built
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_cache_in_float16(size: str, kind: str) -> None:
    compare_half(replace(SIZES[size], half=True, **KINDS[kind]))


@built
@pytest.mark.parametrize("rotary", [False, True])
def test_a_cache_in_float16_is_the_same_in_one_call_and_token_by_token(rotary: bool) -> None:
    """Keys and values are read as they are stored, those of the call itself too."""
    node = Node(rotary=rotary, half=True)
    runs, whole = session(node), Call((20,), 20, 20)
    feeds = whole.feeds(node)
    output, keys, values = runs.run(None, feeds)
    past = {f"past_{name}": np.zeros_like(feeds[f"past_{name}"]) for name in ("key", "value")}
    for token in range(20):
        step = Call((token + 1,), 1, 20).feeds(node) | past
        for name in {"query", "key", "value", "position_ids"} & set(feeds):
            step[name] = feeds[name][:, token : token + 1]
        one, *cache = runs.run(None, step)
        past = dict(zip(past, cache, strict=True))
        np.testing.assert_allclose(one[:, 0], output[:, token], rtol=0, atol=RELATIVE * np.abs(output).max())
    np.testing.assert_array_equal(past["past_key"], keys)
    np.testing.assert_array_equal(past["past_value"], values)


@built
@pytest.mark.parametrize("rotary", [False, True])
def test_inputs_of_a_cache_in_float16_must_be_all_there(rotary: bool) -> None:
    node = Node(rotary=rotary, half=True, body=False, dropped=("position_ids" if rotary else "total_sequence_length",))
    with pytest.raises(Exception, match=rf"KV16.*has input size {9 if rotary else 6} not in range"):
        session(node)


@built
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows(kind: str) -> None:
    """Many blocks of the softmax, some of which a short row or a window hides."""
    node = Node(heads=6, kv_heads=2, size=16, rotary=False, **KINDS[kind])
    own, stock = session(node), session(replace(node, own=False, body=False), native=False)
    for name, call in {
        "one": Call((2100,), 1, 2100),
        "a few": Call((300,), 5, 300),
        "batch": Call((2100, 1, 290), 1, 2200),
        "not in place": Call((1030,), 1, 1029),
    }.items():
        feeds = call.feeds(node)
        check(name, call, own.run(None, feeds), stock.run(None, feeds))
        if call.past >= call.total:
            check(f"{name}, in place", call, run_in_place(own, feeds), run_in_place(stock, feeds))


@built
def test_threads_change_nothing() -> None:
    """Tasks share no sum: every tile of rows goes through its keys in order."""
    node = Node()
    one, two = (session(node, threads=threads) for threads in (1, 2))
    for call in (CALLS["prompt"], Call((300,), 1, 300), Call((390, 10, 200), 1, 389)):
        for got, want in zip(two.run(None, call.feeds(node)), one.run(None, call.feeds(node)), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rotary", [False, True])
def test_the_body_runs_without_the_library(rotary: bool) -> None:
    """ONNX Runtime inlines the function, with and without its optional inputs: the results are those of its node."""
    node, call = Node(rotary=rotary, window=9, softcap=4.0), CALLS["a few tokens"]
    stock = session(replace(node, own=False, body=False), native=False)
    for got, want in zip(
        session(node, native=False).run(None, call.feeds(node)), stock.run(None, call.feeds(node)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@built
def test_the_kernel_runs_and_not_the_body() -> None:
    """Without a body only the library can run it; the error is in its words."""
    node = Node(body=False)
    feeds = CALLS["one token"].feeds(node)
    feeds["position_ids"][:] = 400
    with pytest.raises(Exception, match=r"(?s)GroupQueryAttention 'att': a position lies outside \[0, 400\)"):
        session(node).run(None, feeds)


@built
def test_each_position_of_a_prompt_counts() -> None:
    """As in the standard graph. (ONNX Runtime's node takes the first position of a prompt and counts on from there.)"""
    node = Node()
    runs, call = session(node), Call((6,), 6, 0)
    feeds = call.feeds(node)
    feeds["position_ids"][:] = [[0, 1, 2, 30, 31, 32]]
    keys = runs.run(None, feeds)[1]
    late = Call((3,), 3, 0).feeds(node)
    for name in ("query", "key", "value"):
        late[name] = feeds[name][:, 3:]
    late["position_ids"][:] = [[30, 31, 32]]
    np.testing.assert_array_equal(keys[:, :, 3:], runs.run(None, late)[1])


@built
@pytest.mark.parametrize(
    ("node", "word"),
    [
        (Node(changed={"num_heads": 7}), "kv_num_heads = 2 does not divide num_heads = 7"),
        (Node(changed={"num_heads": 0}), "num_heads is 0"),
        (Node(window=0), "local_window_size is 0"),
        (Node(window=-2), "local_window_size is -2"),
        (Node(softcap=-1.0), "softcap is -1"),
        (Node(changed={"scale": float("nan")}), "scale is nan"),
        (Node(changed={"do_rotary": 0}), "do_rotary is 0 with 10 inputs"),
        (Node(rotary=False, changed={"do_rotary": 1}), "do_rotary is 1 with 7 inputs"),
        (Node(size=24), r"cos has shape \(400, 12\)"),
    ],
)
def test_a_malformed_node_is_named(node: Node, word: str) -> None:
    with pytest.raises(Exception, match=rf"(?s)GroupQueryAttention 'att'.*{word}"):
        session(replace(node, body=False))


def shorten(name: str, axis: int) -> Any:
    def change(feeds: dict[str, Array]) -> None:
        feeds[name] = np.delete(feeds[name], -1, axis)

    return change


def set_to(name: str, value: int) -> Any:
    def change(feeds: dict[str, Array]) -> None:
        feeds[name] = np.full_like(feeds[name], value)

    return change


@built
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (shorten("query", 2), "query"),
        (shorten("key", 2), r"key has shape \(1, 5, 127\); it must have shape \(1, 5, 128\)"),
        (shorten("value", 1), "value has shape"),
        (shorten("past_key", 3), "past_key has shape"),
        (shorten("past_value", 2), "past_value has shape"),
        (shorten("position_ids", 1), "position_ids has shape"),
        (set_to("seqlens_k", 3), "seqlens_k"),
        (set_to("seqlens_k", 25), "seqlens_k"),
        (set_to("total_sequence_length", 24), "total_sequence_length = 24"),
        (set_to("total_sequence_length", -1), "total_sequence_length = -1"),
        (set_to("position_ids", -1), "a position lies outside"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: Any, word: str) -> None:
    """Nothing is read or written beyond a tensor."""
    node = Node(body=False)
    feeds = CALLS["a few tokens"].feeds(node)
    change(feeds)
    with pytest.raises(Exception, match=rf"(?s)GroupQueryAttention 'att'.*{word}"):
        session(node).run(None, feeds)


@built
def test_several_tokens_continue_one_row_only() -> None:
    node = Node(body=False)
    with pytest.raises(Exception, match="in a batch of one only"):
        session(node).run(None, Call((25, 25), 5, 20).feeds(node))


@built
def test_a_head_beyond_the_largest_is_refused() -> None:
    node = Node(heads=1, kv_heads=1, size=520, rotary=False, body=False)
    with pytest.raises(Exception, match="heads of 520 elements; they must be a multiple of 8 up to 512"):
        session(node).run(None, Call((3,), 3, 0).feeds(node))


@built
def test_what_is_not_a_number_stays_visible() -> None:
    """A broken value reaches the results that depend on it, and no others."""
    node = Node(rotary=False)
    call = Call((60,), 60, 0)
    feeds = call.feeds(node)
    feeds["key"][0, 30, 0] = np.nan
    result = session(node).run(None, feeds)[0]
    assert np.isfinite(result[0, :30]).all()
    assert np.isnan(result[0, 30:, :192]).all()
    assert np.isfinite(result[0, :, 192:]).all()
