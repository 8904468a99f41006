"""Llama 4: experts whose inputs are weighted, each computed for every token by the code of transformers."""

from __future__ import annotations

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
