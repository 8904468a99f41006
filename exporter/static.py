"""A cache of a fixed length that is written in place, as a model sees it while ``--graph static`` is traced.

A row of the batch lies in its cache without gaps: the token at position ``p`` of its text is at slot ``p``. Padding
comes last in a row, is written behind its tokens, and later tokens overwrite it before a query looks so far; so a mask
of slots alone hides it, and no mask of padding goes into the graph. States of convolutions and recurrences have one
size anyway; they are what they were behind the last real token of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbook.exporter.rewrite import TRACE_DOMAIN

SCATTER = "Scatter"
"""Placeholder of TensorScatter (opset 24), of which torch knows nothing."""


class FixedLayer:
    """Keys and values of one layer, (batch, heads, slots, size) each, with rows filled up to ``start`` (batch,)."""

    is_sliding = is_compileable = False
    keys: Tensor
    values: Tensor
    index: Tensor
    start: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values (batch, heads, sequence, size) into the slots from ``start``; return all."""
        self.keys, self.values = self._write(self.keys, keys), self._write(self.values, values)
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Write new keys of an indexer (batch, sequence, size) into the slots from ``start``; return all."""
        self.index = self._write(self.index, indexer_key_states[:, None])
        return self.index[:, 0]

    def get_mask_sizes(self, _: int) -> tuple[int, int]:
        """Return the slots, and the first of them."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Tensor:
        """Return the tokens in each row, (batch, 1); code that wants one number for all rows fails on it."""
        return self.start[:, None]

    def _write(self, past: Tensor, new: Tensor) -> Tensor:
        name = f"{TRACE_DOMAIN}::{SCATTER}"
        written: Tensor = torch.onnx.ops.symbolic(
            name, (past, new, self.start), dtype=past.dtype, shape=past.shape, version=1
        )
        return written


def fix_cache(cache: Any, start: Tensor, lengths: Tensor, sequence: int) -> None:
    """Make the tensors of a traced cache buffers whose rows are filled up to ``start`` (batch,).

    Of ``sequence`` new tokens the first ``lengths`` (batch,) of each row are real.
    """
    cache.real = torch.arange(sequence) < lengths[:, None]
    for place, layer in enumerate(cache.layers):
        layer.lengths = lengths
        if getattr(layer, "keys", None) is not None:
            kind: Any = type(
                FixedLayer.__name__, (FixedLayer, type(layer)), {}
            )  # transformers asks for its own classes
            fixed = cache.layers[place] = kind.__new__(kind)
            vars(fixed).update(vars(layer), start=start)
