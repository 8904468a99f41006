"""A cache of a fixed length that is written in place, as a model sees it while ``--graph static`` is traced.

A row of the batch lies in its cache without gaps: the token at position ``p`` of its text is at slot ``p``. Padding
comes last in a row, is written behind its tokens, and later tokens overwrite it before a query looks so far; so a mask
of slots alone hides it, and no mask of padding goes into the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbook.exporter.rewrite import TRACE_DOMAIN

SCATTER = "Scatter"
"""Placeholder of TensorScatter (opset 24), of which torch knows nothing."""


class FixedLayer:
    """Keys and values of one layer, (batch, heads, slots, size) each; what transformers asks of a layer of a cache."""

    is_sliding = is_compileable = False
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor, start: Tensor) -> None:
        """Hold buffers whose rows are filled up to ``start`` (batch,)."""
        self.keys, self.values, self._start = keys, values, start

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (batch, heads, sequence, size) into the slots from ``start``; return all."""
        self.keys, self.values = self._write(self.keys, keys), self._write(self.values, values)
        return self.keys, self.values

    def get_mask_sizes(self, _: int) -> tuple[int, int]:
        """Return the slots, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Tensor:
        """Return the tokens in each row, (batch, 1); code that wants one number for all rows fails on it."""
        return self._start[:, None]

    def _write(self, past: Tensor, new: Tensor) -> Tensor:
        name = f"{TRACE_DOMAIN}::{SCATTER}"
        written: Tensor = torch.onnx.ops.symbolic(
            name, (past, new, self._start), dtype=past.dtype, shape=past.shape, version=1
        )
        return written


def fixed_cache(cache: Any, start: Tensor) -> Any:
    """Return a cache whose layers of keys and values are buffers, with rows filled up to ``start`` (batch,)."""
    from transformers.cache_utils import DynamicLayer

    kind = type(FixedLayer.__name__, (FixedLayer, DynamicLayer), {})  # transformers asks for a class of its own
    cache.layers = [
        kind(layer.keys, layer.values, start) if layer.keys is not None else layer for layer in cache.layers
    ]
    return cache
