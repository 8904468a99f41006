"""Attention and its mask as transformers should compute them while a graph is traced.

One ONNX Attention node per layer, with fewer key than query heads where the model has them, and one boolean mask per
kind of layer, computed from index comparisons only: what transformers builds by itself indexes the padding mask
element by element, and asks whether the sequence has one token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankbook.calibration.model.adapter import adapter_of
from rankbook.exporter import indexer
from rankbook.exporter.rewrite import TRACE_DOMAIN

IMPLEMENTATION = "rankbook_export"
"""Name under which `register` makes `attend` and `mask` known to transformers."""
ADDITIVE = "rankbook_export_additive"
"""Name of `additive_mask`, for models with an attention of their own, which add the mask to their scores."""
_KNOWN = ("s_aux", "indices", "position_ids", "cache_position")
"""Tensors that models may give to an attention beside the mask: sinks, chosen keys, what the mask holds already."""
SINKS = "SinkAttention"
"""Placeholder of an Attention with a fifth input: for each head a score to which no key and no value belongs."""


def register() -> None:
    """Make the functions known to transformers; doing so twice is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    AttentionMaskInterface.register(ADDITIVE, additive_mask)


def attend(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention output (batch, sequence, heads, size) of query (batch, heads, sequence, size).

    Raises:
        ValueError: The model asks for something that the ONNX operator cannot do.
    """
    if others := [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _KNOWN]:
        raise ValueError(f"attention with {others[0]} cannot be exported to the ONNX Attention operator")
    sinks, indices = kwargs.get("s_aux"), kwargs.get("indices")
    if indices is not None:
        if attention_mask is None:
            raise ValueError("attention with indices cannot be exported without a mask, which hides what is not chosen")
        attention_mask = indexer.chosen(attention_mask, indices)
    return _node((query, key, value), attention_mask, scaling, softcap, sinks).transpose(1, 2).contiguous(), None


def _node(
    given: tuple[Tensor, Tensor, Tensor],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the result (batch, heads, sequence, size) of an Attention node with queries, keys and values."""
    query, key, value = given
    softcap = 0.0 if softcap is None else float(softcap)
    if value.shape[-1] == query.shape[-1] and sinks is None:
        same: Tensor = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling, softcap=softcap)[0]
        return same
    # Of these torch takes the result to be of the size of queries.
    attributes = {"scale": query.shape[-1] ** -0.5 if scaling is None else scaling, "softcap": softcap}
    inputs, kind, version = [*given, attention_mask], "Attention", 23
    if sinks is not None:
        inputs, kind, version = [*inputs, sinks.to(query.dtype)], f"{TRACE_DOMAIN}::{SINKS}", 1
    shape = [*query.shape[:-1], value.shape[-1]]
    output: Tensor = torch.onnx.ops.symbolic(kind, inputs, attributes, dtype=query.dtype, shape=shape, version=version)
    return output


def replace_own(model: nn.Module) -> bool:
    """Have attention of a model's own code computed by `attend`, where it is a method that is given all it needs.

    Returns:
        Whether it is; the model then wants the masks of `IMPLEMENTATION`.
    """
    adapter = adapter_of(model)
    method = adapter.attention_method
    modules: list[Any] = [module for module in model.modules() if method and hasattr(module, method)]
    for module, window in zip(modules, adapter.windows() if modules else [], strict=True):
        scaling = 1 / float(getattr(module, "scale_attn", 1.0))
        setattr(module, method, functools.partial(_attend_within, scaling=scaling, window=window))
    return bool(modules)


def _attend_within(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, window: int
) -> tuple[Tensor, None]:
    """Return the attention output (batch, heads, sequence, size); a query sees ``window`` keys, itself included."""
    if window > 0:
        place = torch.arange(key.shape[2], dtype=torch.float32)  # TensorRT has no maximum of integers
        own = torch.where(attention_mask, place, -1.0).amax(-1, keepdim=True)  # the last key that a query sees
        attention_mask = attention_mask & (place > own - window)
    return _node((query.to(value.dtype), key, value), attention_mask, scaling), None


def mask(
    *,
    q_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    attention_mask: Tensor,
    **_: Any,
) -> Tensor:
    """Return which keys each query sees, bool (batch, 1, sequence, past + sequence).

    A query always sees itself, so that the rows of padding have something to normalize: a row without any key is NaN in
    some runtimes, and the NaN would spread through the values of later layers.

    An offset for each row, (batch, 1), is that of a cache of a fixed length, where no query sees padding without a mask
    of it (`rankbook.exporter.static`).
    """
    fixed = isinstance(q_offset, Tensor)
    query = torch.arange(q_length) + q_offset
    query = (query if fixed else query[None])[:, None, :, None]
    # The length is taken from the mask: it equals past + sequence, but torch.export knows it as a size of its own.
    key = torch.arange(attention_mask.shape[1])[None, None, None, :]
    # Chunks begin where the padding of a row ends; no supported pattern depends on the head.
    row, head = torch.arange(attention_mask.shape[0])[:, None, None, None], torch.zeros((), dtype=torch.int64)
    seen = mask_function(row, head, query, key)
    return seen if fixed else seen & (attention_mask[:, None, None, :] | (query == key))


def additive_mask(*, dtype: torch.dtype = torch.float32, **given: Any) -> Tensor:
    """Return `mask` as numbers in ``dtype`` to add to scores: 0 where a query sees a key, a very low one elsewhere."""
    # Half of the lowest number: a score that is added must not make it infinite.
    return torch.where(mask(**given), 0.0, torch.finfo(dtype).min / 2).to(dtype)


class ComplexRotary:
    """A rotary embedding as complex numbers, whose axes are added while they are pairs of real ones.

    ONNX has no complex numbers, and torch's exporter writes no other operation of them than their product.
    """

    def __init__(self, values: Tensor) -> None:
        """Hold complex values (batch, sequence, size / 2)."""
        self._pairs = torch.view_as_real(values)

    def to(self, _device: Any) -> ComplexRotary:
        """Return this: a trace has one device."""
        return self

    def unsqueeze(self, dim: int) -> Tensor:
        """Return complex values with a new axis."""
        return torch.view_as_complex(self._pairs.unsqueeze(dim))

    def __getitem__(self, index: Any) -> Tensor:
        """Return complex values with the axes of an index."""
        return torch.view_as_complex(self._pairs[index])


def without_complex_axes(model: nn.Module) -> None:
    """Wrap what rotary embeddings return in `ComplexRotary` where it is complex."""

    def wrap(_module: nn.Module, _args: Any, output: Any) -> Any:
        return ComplexRotary(output) if isinstance(output, Tensor) and output.is_complex() else output

    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.register_forward_hook(wrap)


def rotary_tables(model: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Return cos and sin of a model's rotary embedding, (positions, size / 2) each; None where it has none."""
    adapter = adapter_of(model)
    if (found := adapter.rotary()) is None:
        return None
    positions = torch.arange(adapter.context())[None]
    with torch.no_grad():
        tables: Any = found(torch.zeros(1, dtype=torch.float32), positions)
    if not isinstance(tables, tuple):  # complex numbers
        return None
    cos, sin = (table[0, :, : table.shape[-1] // 2].float().numpy() for table in tables)
    return cos, sin
