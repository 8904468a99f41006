"""Attention over chosen keys alone: an indexer scores all of them for each query (DeepSeek V3.2, section 2.1).

transformers chooses ``min(index_topk, keys)`` of them, and a trace would fix which of the two is smaller. While the
number of keys is unknown, the indexer therefore has ``index_topk`` keys more than there are, which nobody sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MASK = 3
"""Place of the mask (batch, sequence, keys) among the arguments of an indexer."""


def make_traceable(model: nn.Module) -> None:
    """Give every indexer of a model enough keys to choose from."""
    for module in model.modules():
        if hasattr(module, "index_topk"):
            module.register_forward_pre_hook(_lengthen, with_kwargs=True)


def chosen(mask: Tensor, indices: Tensor) -> Tensor:
    """Return which keys each query sees, bool (batch, 1, sequence, keys).

    Args:
        mask: Which it may see, bool of that shape.
        indices: The keys that were chosen for each query, (batch, sequence, number of them); some may be none at all.
    """
    keys, count = mask.shape[-1], indices.shape[-1]
    found = torch.zeros(*indices.shape[:2], keys + count).scatter(-1, indices.long(), 1.0)
    return mask & (found[:, None, :, :keys] > 0)


class _Longer:
    """A cache with ``count`` rows of zeros behind the keys of an indexer (batch, keys, size)."""

    def __init__(self, cache: Any, count: int) -> None:
        self._cache, self._count = cache, count

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        every: Tensor = self._cache.update_indexer(keys, layer)
        return torch.cat([every, every.new_zeros(every.shape[0], self._count, every.shape[2])], 1)


def _lengthen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    mask, count = args[_MASK], int(module.index_topk)
    keys: Any = mask.shape[-1] if isinstance(mask, Tensor) else 0
    if isinstance(keys, int):  # a cache of a fixed length, or another kind of indexer
        return None
    longer = torch.cat([mask, mask.new_zeros(*mask.shape[:-1], count)], -1)
    more = {"past_key_values": _Longer(kwargs["past_key_values"], count)}
    return (*args[:_MASK], longer, *args[_MASK + 1 :]), kwargs | more
