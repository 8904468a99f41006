"""Continuing a text with a cache, as ``generate`` of transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import adapter_of


class Continuation:
    """A text that grows.

    Where the family says so (LongRoPE), the cache is computed again once the text passes the original context. A model
    that returns none (RecurrentGemma keeps it in its modules) computes the whole text at each call.
    """

    def __init__(self, model: Any) -> None:
        """Begin with no text."""
        adapter = adapter_of(model)
        self._model, self._limit, self._argument = model, adapter.restart_at(), adapter.cache_argument
        # Some families (Bamba) count positions from 0 at every call where they are not given; images have three parts.
        self._counts = adapter.takes_positions and not adapter.positions_have_parts()
        self._cache: Any = None
        self._text: Tensor | None = None

    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens (batch, length); return the logits behind the last one, (batch, vocabulary) float32."""
        past = 0 if self._text is None else self._text.shape[1]
        self._text = tokens if self._text is None else torch.cat([self._text, tokens], dim=1)
        if past <= self._limit < self._text.shape[1]:
            self._cache = None
        if self._cache is None:
            tokens = self._text
        given: dict[str, Any] = {self._argument: self._cache}
        if self._counts and self._cache is not None:
            given["position_ids"] = torch.arange(past, self._text.shape[1], device=tokens.device)[None]
        output = self._model(input_ids=tokens, use_cache=True, **given)
        self._cache = output.get(self._argument)
        logits: Tensor = output.logits[:, -1].float()
        return logits
