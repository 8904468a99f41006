"""MPT: attention with linear biases (ALiBi, Press et al. 2021, arXiv 2108.12409)."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter


class Mpt(ModelAdapter):
    """The bias of a key follows from its distance to the last one."""

    families = ("mpt",)
    sees_by_mask = True

    def make_traceable(self) -> None:
        """Compute biases from the keys there are: transformers cuts them out of those of the longest text."""
        for module in self.model.modules():
            if hasattr(module, "Wqkv"):
                module.forward = types.MethodType(_attend, module)


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return the attention's output (batch, length, hidden) and its weights.

    Args:
        self: The attention.
        hidden_states: (batch, length, hidden).
        position_bias: Of the longest text, (heads, 1, positions); the last ones are those of the last keys.
        past_key_values: Cache.
        attention_mask: True where a key is hidden, (batch, 1, length, keys).
    """
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (
        part.reshape(*hidden_states.shape[:2], self.n_heads, self.head_dim).transpose(1, 2)
        for part in mixed.chunk(3, dim=2)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    slopes = (position_bias[:, :, -1:] - position_bias[:, :, -2:-1]).to(query.dtype)
    distance = torch.arange(key.shape[2]) + (1 - key.shape[2])
    scores = query @ key.transpose(-1, -2) * self.softmax_scale + slopes * distance.to(query.dtype)
    if attention_mask is not None:
        scores = scores + torch.where(~attention_mask, 0.0, torch.finfo(query.dtype).min / 2).to(query.dtype)
    weights = scores.float().softmax(-1).to(value.dtype)
    result = (weights @ value).transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
    return self.out_proj(result), weights


ADAPTER = Mpt
