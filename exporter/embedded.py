"""Whether a model computes the same from embedded tokens (``--inputs embeds``) as from their numbers."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import Any

import torch
from torch import nn

from rankbook.calibration.model.adapter import adapter_of
from rankbook.exporter import refusal
from rankbook.exporter.cache import BATCH, SEQUENCE, called
from rankbook.exporter.skeleton import EmbeddingPlaceholder, Skeleton


def require(skeleton: Skeleton) -> None:
    """Check that the numbers of tokens are used for nothing but the token embedding.

    Gemma 3n and 4 look up an embedding for each block with them, and leave it out where they are not given.

    Raises:
        ValueError: They are; the message names for what.
    """
    model, adapter = skeleton.model, adapter_of(skeleton.model)
    tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    embedded = torch.zeros(BATCH, SEQUENCE, adapter.hidden_size, dtype=skeleton.dtype)
    own, seen = adapter.embeddings().embedding[1], Counter[str]()
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Embedding, EmbeddingPlaceholder)) and module is not own:
                hooks.enter_context(module.register_forward_pre_hook(functools.partial(_count, seen, name)))
        called(skeleton, input_ids=tokens)
        wanted = Counter(seen)
        seen.clear()
        try:
            called(skeleton, inputs_embeds=embedded)
        except refusal.TRACE_ERRORS:
            why = "it cannot be called without them"
        else:
            why = ", ".join(f"{name} is looked up with them" for name in wanted - seen)
    if why:
        raise ValueError(
            f"a model of type {model.config.model_type!r} needs the numbers of tokens: {why}; export with --inputs ids"
        )


def _count(seen: Counter[str], name: str, *_: Any) -> None:
    seen[name] += 1
