"""Llama 4: experts whose inputs are weighted, each computed for every token by the code of transformers."""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.model.adapter import ModelAdapter


class Llama4(ModelAdapter):
    """The chosen experts alone are computed where they are linear layers."""

    families = ("llama4", "llama4_text")

    def unify_experts(self) -> None:
        """Describe the experts as other families do."""
        for module in self.model.modules():
            if hasattr(module, "experts") and hasattr(module, "router") and hasattr(module, "shared_expert"):
                module.experts.expert_matrices = {"gate_up_proj": True, "down_proj": True}
                module.forward = types.MethodType(_mixture, module)

    def make_traceable(self) -> None:
        """Scale queries of layers without a rotary embedding where each row of a batch has a position of its own."""
        for module in self.model.modules():
            if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
                module.forward = types.MethodType(_attend, module)


class _Scaled(nn.Module):
    """A projection whose results (batch, length, features) are scaled by token."""

    def __init__(self, projection: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.projection, self.scales = projection, scales

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection(x)
        return (y * self.scales[..., None]).to(y.dtype)


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **more: Any,
) -> Any:
    """Return what the attention does: its queries grow with the logarithm of their positions (arXiv 2501.19399)."""
    past = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
    positions = torch.arange(hidden_states.shape[1]) + past  # (length,), or one row for each text
    scales = torch.log1p(torch.floor((positions.float() + 1.0) / self.floor_scale)) * self.attn_scale + 1.0
    layer: Any = copy.copy(self)
    layer.attn_temperature_tuning = False
    layer._modules = {**self._modules, "q_proj": _Scaled(self.q_proj, scales)}
    return type(self).forward(layer, hidden_states, position_embeddings, attention_mask, past_key_values, **more)


def _mixture(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the shared expert and the chosen ones, (tokens, hidden), and the router's logits."""
    if "gate_up_proj" in self.experts._parameters:  # fused still
        found: tuple[Tensor, Tensor] = type(self).forward(self, hidden_states)
        return found
    x = hidden_states.reshape(-1, self.hidden_dim)
    logits = nn.Linear.forward(self.router, x)
    scores, numbers = torch.topk(logits, self.top_k, dim=1)
    weights = torch.sigmoid(scores.float()).to(x.dtype)
    weighted, numbers = (x[:, None] * weights[..., None]).flatten(0, 1), numbers.reshape(-1)
    gate, up = self.experts.gate_up_proj(weighted, numbers).chunk(2, dim=-1)
    y = self.experts.down_proj(up * self.experts.act_fn(gate), numbers)
    return self.shared_expert(x) + y.reshape(x.shape[0], self.top_k, -1).sum(1), logits


ADAPTER = Llama4
