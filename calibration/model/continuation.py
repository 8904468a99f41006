"""Continuing a text with a cache of keys and values, as ``generate`` of transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import adapter_of


class Continuation:
    """A text that grows.

    Where the family says so (LongRoPE), the cache is computed again once the text passes the original context.
    """

    def __init__(self, model: Any) -> None:
        """Begin with no text."""
        self._model, self._limit = model, adapter_of(model).restart_at()
        self._cache: Any = None
        self._text: Tensor | None = None

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch, length); return the logits behind the last one, (batch, vocabulary) float32."""
        past = 0 if self._text is None else self._text.shape[1]
        self._text = tokens if self._text is None else torch.cat([self._text, tokens], dim=1)
        if past <= self._limit < self._text.shape[1]:
            self._cache, tokens = None, self._text
        output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1].float()
        return logits
