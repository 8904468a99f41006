"""The attention operators, in float32: ``rankbook::GroupQueryAttention``, and two whose cache is float16.

The first is ``com.microsoft::GroupQueryAttention`` of ONNX Runtime with the ports and attributes that the exporter
gives it; its body is that one node. The others (`HALF`, and `ROTARY_HALF` with the rotary embedding) store keys and
values in float16 and read those of the new tokens rounded, so that it does not matter in how many calls a text is
given. ONNX Runtime's node knows no such cache: their bodies have Casts around it.

Letters in the shapes: B rows of the batch, S new tokens of each, N query heads, M heads of keys and values, H elements
of a head, P positions of the past's buffer, L = max(P, total) of the present's, R positions of the cos and sin tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rankbook.plugins.contract import Array, Attribute, Operator, Port, Stock
from rankbook.plugins.forms import TensorSpec

NAME = "GroupQueryAttention"
"""The op_type, in the domain ``rankbook`` and in ONNX Runtime's."""
HALF_NAMES = "GroupQueryAttentionKV16", "GroupQueryAttentionRotaryKV16"
"""The op_types with a cache in float16, without and with a rotary embedding inside."""
LARGEST_HEAD = 512
"""Largest H."""
HEAD_STEP, ROTARY_STEP = 8, 16
"""What H is a multiple of, without and with a rotary embedding inside (ONNX Runtime's node asks for the same)."""
SINKS = 11
"""Place of the sinks, one score for each head, among the inputs of ONNX Runtime's node; the operator has none."""
ROTARY = "do_rotary"
"""Attribute that says whether a node has the cos and sin tables of a rotary embedding and positions."""

Doubles = npt.NDArray[np.float64]


def supports(head: int, *, rotary: bool) -> bool:
    """Say whether the kernel takes heads of so many elements."""
    return 0 < head <= LARGEST_HEAD and head % (ROTARY_STEP if rotary else HEAD_STEP) == 0


def compute(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
    """Return output (B, S, N * H), float32, and keys and values (B, M, L, H), typed as the past, the new ones included.

    Sums are in float64; new keys and values are read as they are stored. A prompt (S equals the total) begins at
    position 0; otherwise the last token of row b is number ``seqlens_k[b]``. A query sees the keys up to its own,
    ``local_window_size`` of them where that is not -1. Scores become ``softcap * tanh(score / softcap)`` where softcap
    is not 0. What the buffers hold behind the new keys is 0.
    """
    heads, kv_heads = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    query, new, fresh = (
        _heads(inputs[name], count) for name, count in (("query", heads), ("key", kv_heads), ("value", kv_heads))
    )
    if "cos" in inputs:
        query, new = _embed(query, inputs), _embed(new, inputs)
    stored = inputs["past_key"].dtype
    new, fresh = (part.astype(stored).astype(np.float64) for part in (new, fresh))
    batch, _, tokens, size = query.shape
    total, past = int(inputs["total_sequence_length"]), inputs["past_key"].shape[2]
    keys, values = np.zeros((2, batch, kv_heads, max(past, total), size))
    output = np.zeros((batch, tokens, heads, size))
    for row in range(batch):
        before = 0 if tokens == total else int(inputs["seqlens_k"][row]) + 1 - tokens
        for buffer, old, added in ((keys, "past_key", new), (values, "past_value", fresh)):
            buffer[row, :, :before] = inputs[old][row, :, :before]
            buffer[row, :, before : before + tokens] = added[row]
        for token in range(tokens):
            output[row, token] = _attend(query[row, :, token], keys[row], values[row], before + token, attributes)
    flat = output.reshape(batch, tokens, heads * size)
    return flat.astype(np.float32), keys.astype(stored), values.astype(stored)


def _heads(x: Array, heads: int) -> Doubles:
    """Turn (B, S, heads * H) into (B, heads, S, H)."""
    batch, tokens, width = x.shape
    return x.astype(np.float64).reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3)


def _embed(x: Doubles, inputs: Mapping[str, Array]) -> Doubles:
    """Rotate the halves of each head by the angles of its position (Su 2021, arXiv 2104.09864)."""
    cos, sin = (inputs[name].astype(np.float64)[inputs["position_ids"]][:, None] for name in ("cos", "sin"))
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attend(query: Doubles, keys: Doubles, values: Doubles, last: int, attributes: Mapping[str, Any]) -> Doubles:
    """Return the result (N, H) of one token: query (N, H) over keys and values (M, L, H) up to position ``last``."""
    window, softcap = int(attributes["local_window_size"]), float(attributes["softcap"])
    first = max(0, last + 1 - window) if window > 0 else 0
    groups = query.reshape(len(keys), -1, query.shape[1])
    scale = float(attributes["scale"]) or query.shape[1] ** -0.5
    scores = groups @ keys[:, first : last + 1].transpose(0, 2, 1) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Doubles = weights / weights.sum(axis=-1, keepdims=True) @ values[:, first : last + 1]
    return result.reshape(query.shape)


def _port(name: str, shape: tuple[str, ...], doc: str, dtype: str = "float32") -> Port:
    return Port(name, (shape,), (dtype,), False, doc)


def _inputs(cache: str) -> tuple[Port, ...]:
    """Return the inputs of a node without a rotary embedding, whose cache has a type."""
    return (
        _port("query", ("B", "S", "N * H"), "of the new tokens"),
        _port("key", ("B", "S", "M * H"), "of the new tokens"),
        _port("value", ("B", "S", "M * H"), "of the new tokens"),
        _port("past_key", ("B", "M", "P", "H"), "keys before them", cache),
        _port("past_value", ("B", "M", "P", "H"), "values before them", cache),
        _port("seqlens_k", ("B",), "keys of a row less one, new ones included", "int32"),
        _port("total_sequence_length", (), "keys of the longest row", "int32"),
    )


def _rotary(given_if: str) -> tuple[Port, ...]:
    """Return the inputs of the rotary embedding, there only with an attribute if it has a name."""
    shape, doc = ("R", "H / 2"), "of the angle of each position"
    tables = (Port(name, (shape,), ("float32",), True, doc, given_if) for name in ("cos", "sin"))
    return (*tables, Port("position_ids", (("B", "S"),), ("int64",), False, "each in [0, R)", given_if))


def _outputs(cache: str) -> tuple[Port, ...]:
    return (
        _port("output", ("B", "S", "N * H"), "result"),
        _port("present_key", ("B", "M", "L", "H"), "may be the memory of past_key", cache),
        _port("present_value", ("B", "M", "L", "H"), "may be the memory of past_value", cache),
    )


_ROTARY_ATTRIBUTE = Attribute(ROTARY, "int", "1 if query and key are embedded inside, else 0", high=1)


def _attributes(*more: Attribute) -> tuple[Attribute, ...]:
    return (
        Attribute("num_heads", "int", "N", low=1),
        Attribute("kv_num_heads", "int", "M, which divides N", low=1),
        Attribute("local_window_size", "int", "keys that a query sees, its own included; -1 for all", low=-1),
        *more,
        Attribute("scale", "float", "factor of the scores; 0 for H ** -0.5"),
        Attribute("softcap", "float", "bound of the scores; 0 for none"),
    )


def _sizes(attributes: Mapping[str, Any]) -> dict[str, int]:
    return {"N": attributes["num_heads"], "M": attributes["kv_num_heads"]}


def _check_heads(attributes: Mapping[str, Any], constants: Mapping[str, TensorSpec]) -> str:
    del constants
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    return f"kv_num_heads = {kv_heads} does not divide num_heads = {heads}" if heads % kv_heads else ""


OPERATOR = Operator(
    NAME,
    NAME,
    (*_inputs("float32"), *_rotary(ROTARY)),
    _outputs("float32"),
    _attributes(_ROTARY_ATTRIBUTE),
    compute,
    "stock",
    sizes=_sizes,
    check=_check_heads,
    stock=Stock(NAME, (0, 1, 2)),
    limits={"largest_head": LARGEST_HEAD, "head_step": HEAD_STEP, "rotary_step": ROTARY_STEP},
)
HALF, ROTARY_HALF = (
    Operator(
        name,
        name,
        (*_inputs("float16"), *rotary),
        _outputs("float16"),
        _attributes(),
        compute,
        "half_cache",
        sizes=_sizes,
        check=_check_heads,
    )
    for name, rotary in zip(HALF_NAMES, ((), _rotary("")), strict=True)
)

OPERATORS = (OPERATOR, HALF, ROTARY_HALF)
"""The operators of this module."""
