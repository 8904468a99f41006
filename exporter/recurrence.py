"""Recurrent layers as they are traced: one placeholder in place of the functions of transformers.

Those loop over tokens or chunks, whose number a trace would fix. `rankbook.exporter.passes.recurrence` writes the
placeholder in standard operators.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.exporter.rewrite import TRACE_DOMAIN

RECURRENCE = "Recurrence"
"""Placeholder of a recurrence over the tokens of a text.

Its inputs are float32: the state (batch, heads, keys, values), queries and keys (batch, sequence, heads, keys), values
(batch, sequence, heads, values), logarithms of decays (batch, sequence, heads) or (batch, sequence, heads, keys), and
for `DELTA` weights of what is new (batch, sequence, heads). Its outputs are (batch, sequence, heads, values) and the
state behind the last token.
"""
KIND = "kind"
"""Attribute of a placeholder."""
GATED = "gated"
"""``S = exp(g) S + k v``, ``y = q S`` with outer products of rows: Mamba 2; its state is (batch, heads, values,
keys)."""
DELTA = "delta"
"""``S = exp(g) S; S = S + k (beta (v - k S))``, ``y = q S``: the gated delta rule (Yang et al. 2024, section 3)."""
SELECTIVE = "selective"
"""``S = exp(dt A) S + (dt x) B``, ``y = S C``: Mamba (Gu and Dao 2023, section 3.2).

Its inputs are the state (batch, features, states), x and dt (batch, sequence, features), A (features, states), B and C
(batch, sequence, states); the first output is (batch, sequence, features).
"""


@contextlib.contextmanager
def traceable(model: nn.Module, cache: Any) -> Iterator[None]:
    """Put placeholders in the places of the recurrent functions of a model, which continue the states of a cache.

    Padding that the cache knows of (`rankbook.exporter.cache.traced_cache`) leaves a state as it is; of padding that
    comes first the model's own code makes the inputs zero.
    """
    real = cache.real
    functions: dict[str, Callable[..., Any]] = {
        "torch_chunk_gated_delta_rule": functools.partial(_delta_rule, real=real),
        "chunk_kimi_delta_attention": functools.partial(_delta_rule, real=real),
        "mamba2_chunk_scan": functools.partial(_chunk_scan, real=real),
        "mamba_selective_scan": functools.partial(_selective_scan, cache, real=real),
    }
    if real is not None:
        functions["create_recurrent_attention_mask"] = lambda *_, **__: None
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    with contextlib.ExitStack() as stack:
        for layer in model.modules():
            if type(layer).__name__ == "MiniMaxLightningAttention":
                stack.callback(delattr, layer, "forward")
                layer.forward = functools.partial(_lightning, layer, real=real)
        for module in modules:
            for name, function in functions.items():
                if hasattr(module, name):
                    stack.callback(setattr, module, name, getattr(module, name))
                    setattr(module, name, function)
        yield


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor,
    real: Tensor | None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return y (batch, sequence, heads, values) and the new state; fewer heads of queries and keys serve several."""
    repeats = value.shape[2] // key.shape[2]
    rows = [_repeated(item, repeats).float() for item in (query, key)]
    if use_qk_l2norm_in_kernel:
        rows = [item * torch.rsqrt((item * item).sum(-1, keepdim=True) + 1e-6) for item in rows]
    scaled = rows[0] * query.shape[-1] ** -0.5
    steps = [_at_tokens(item, real) for item in (g, beta)]
    y, state = _node(DELTA, initial_state, [scaled, rows[1], value, *steps], value.shape)
    return y.to(query.dtype), state


def _chunk_scan(
    *rows: Tensor,
    initial_states: Tensor,
    real: Tensor | None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Return y (batch, sequence, heads, size) and the new state (batch, heads, size, states) of Mamba 2.

    The arguments that have an order are x (batch, sequence, heads, size), dt (batch, sequence, heads), A (heads,), and
    B and C (batch, sequence, groups, states).
    """
    x, dt, a, b, c = rows
    step = _step(dt, more.get("dt_bias"), more)
    if tuple(dt_limit) != (0.0, float("inf")):
        step = torch.clamp(step, *dt_limit)
    step = _at_tokens(step, real)
    x, repeats = x.float(), x.shape[2] // b.shape[2]
    inputs = [_repeated(c, repeats), _repeated(b, repeats), x * step[..., None], a.float() * step]
    y, state = _node(GATED, initial_states, inputs, x.shape)
    skip = more.get("D")
    return (y if skip is None else y + x * skip[:, None]), state


def _selective_scan(cache: Any, *rows: Tensor, real: Tensor | None, **more: Any) -> tuple[Tensor, Tensor]:
    """Return y (batch, features, sequence) and the new state of Mamba, whose function is not given the last one.

    The arguments that have an order are x and dt (batch, features, sequence), A (features, states), B and C (batch,
    states, sequence).
    """
    x, dt, a, b, c = rows
    bias = more.get("delta_bias")
    step = _step(dt, None if bias is None else bias[:, None], more)
    turned = [item.transpose(1, 2) for item in (x, step, b, c)]
    turned[1] = _at_tokens(turned[1], real)
    y, state = _node(SELECTIVE, cache.asked, [*turned[:2], a, *turned[2:]], turned[0].shape)
    y, skip, gate = y.transpose(1, 2), more.get("D"), more.get("z")
    y = y if skip is None else y + x.float() * skip[:, None]
    return (y if gate is None else y * nn.functional.silu(gate.float())).to(x.dtype), state


def _lightning(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    *,
    real: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the output (batch, sequence, hidden) of a layer with lightning attention (MiniMax-01, section 2.2)."""
    mixed = _at_tokens(layer.act_fn(layer.qkv_proj(hidden_states)), real)
    if attention_mask is not None:
        mixed = mixed * attention_mask[..., None]
    rows = mixed.reshape(*mixed.shape[:2], layer.num_attention_heads, -1)
    query, key, value = rows.chunk(3, -1)
    decay = _at_tokens(-layer.slope_rate.reshape(-1).expand(rows.shape[:3]), real)
    state = past_key_values.get_linear_cache(layer.layer_idx).transpose(2, 3)
    y, state = _node(GATED, state, [query, key, value, decay], value.shape)
    past_key_values.set_linear_cache(layer.layer_idx, state.transpose(2, 3))
    y = layer.norm(y.flatten(2).to(mixed.dtype))
    return layer.out_proj(nn.functional.sigmoid(layer.output_gate(hidden_states)) * y), None


def _step(dt: Tensor, bias: Tensor | None, more: Mapping[str, Any]) -> Tensor:
    """Return sizes of steps in float32."""
    step = dt.float() if bias is None else dt.float() + bias.float()
    return nn.functional.softplus(step) if more.get("dt_softplus") or more.get("delta_softplus") else step


def _at_tokens(x: Tensor, real: Tensor | None) -> Tensor:
    """Return x (batch, sequence, ...) with zeros at padding: nothing decays there, and nothing is new."""
    return x if real is None else x * real.reshape(*real.shape, *[1] * (x.ndim - 2))


def _repeated(x: Tensor, count: int) -> Tensor:
    """Return x (batch, sequence, heads, size) with every head ``count`` times in a row."""
    if count == 1:
        return x
    batch, length, heads, size = x.shape
    return x[:, :, :, None].expand(-1, -1, -1, count, -1).reshape(batch, length, heads * count, size)


def _node(kind: str, state: Tensor, inputs: list[Tensor], shape: Any) -> list[Tensor]:
    made: Any = torch.onnx.ops.symbolic_multi_out(
        f"{TRACE_DOMAIN}::{RECURRENCE}",
        [state.float(), *(item.float() for item in inputs)],
        {KIND: kind},
        dtypes=[torch.float32, torch.float32],
        shapes=[list(shape), list(state.shape)],
        version=1,
    )
    return list(made)
