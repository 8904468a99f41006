"""The numpy definition of the attention node, beside softmax written out for one head and token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rankbook.plugins import attention

SIZES: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.0, "softcap": 0.0, "local_window_size": -1}
HEAD, TOKENS, PAST = 8, 3, 5


def inputs(rotary: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    found: dict[str, Any] = {"query": draw(1, TOKENS, 4 * HEAD)}
    found |= {name: draw(1, TOKENS, 2 * HEAD) for name in ("key", "value")}
    found |= {name: draw(1, 2, PAST, HEAD) for name in ("past_key", "past_value")}
    found |= {"seqlens_k": np.array([PAST + TOKENS - 1], np.int32)}
    found |= {"total_sequence_length": np.array(PAST + TOKENS, np.int32)}
    if rotary:
        found |= {"cos": np.zeros((16, HEAD // 2), np.float32), "sin": np.ones((16, HEAD // 2), np.float32)}
        found["position_ids"] = np.arange(PAST, PAST + TOKENS)[None]
    return found


@pytest.mark.parametrize("changes", [{}, {"local_window_size": 3}, {"softcap": 2.0}, {"scale": 0.1}])
def test_each_token_attends_to_the_keys_up_to_its_own(changes: dict[str, Any]) -> None:
    given, attributes = inputs(), {**SIZES, **changes, attention.ROTARY: 0}
    output, keys, values = attention.compute(given, attributes)
    head, token = 3, 1  # query head 3 reads the second of two heads of keys
    q = given["query"].reshape(TOKENS, 4, HEAD)[token, head].astype(np.float64)
    last = PAST + token
    first = last - 2 if changes.get("local_window_size") else 0
    scores = keys[0, 1, first : last + 1] @ q * (attributes["scale"] or HEAD**-0.5)
    if cap := attributes["softcap"]:
        scores = cap * np.tanh(scores / cap)
    weights = np.exp(scores) / np.exp(scores).sum()
    want: Any = weights @ values[0, 1, first : last + 1]
    got = output.astype(np.float64).reshape(TOKENS, 4, HEAD)[token, head]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_new_keys_lie_behind_the_past() -> None:
    given = inputs()
    _, keys, values = attention.compute(given, {**SIZES, attention.ROTARY: 0})
    np.testing.assert_array_equal(keys[:, :, :PAST], given["past_key"])
    np.testing.assert_array_equal(values[0, :, PAST:], given["value"].reshape(TOKENS, 2, HEAD).transpose(1, 0, 2))


def test_a_quarter_turn_swaps_the_halves() -> None:
    given = inputs(rotary=True)
    turned: Any
    _, turned, _ = attention.compute(given, {**SIZES, attention.ROTARY: 1})
    first, second = np.split(given["key"].reshape(TOKENS, 2, HEAD).transpose(1, 0, 2), 2, axis=-1)
    np.testing.assert_allclose(turned[0, :, PAST:], np.concatenate([-second, first], axis=-1), rtol=1e-6)


def test_heads_that_the_kernel_takes() -> None:
    assert attention.supports(64, rotary=True)
    assert attention.supports(72, rotary=False)
    assert not attention.supports(72, rotary=True)
    assert not attention.supports(attention.LARGEST_HEAD + 8, rotary=False)
