"""DBRX: the matrices of all experts of a block lie one below the other in a tensor of two dimensions."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter


class Dbrx(ModelAdapter):
    """Gate, up and down projections of the experts are ``w1``, ``v1`` and ``w2``."""

    families = ("dbrx",)

    def unify_experts(self) -> None:
        """Describe the experts as other families do."""
        for module in self.model.modules():
            if hasattr(module, "mlp") and hasattr(module.mlp, "v1"):
                module.mlp.expert_matrices = {"w1": False, "v1": False, "w2": True}
                module.mlp.experts_below = module.num_experts
                module.forward = types.MethodType(_experts, module)


def _experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts, (batch, length, hidden); chosen ones (tokens, k) as numbers."""
    if "w1" in self.mlp._parameters:  # fused still
        found: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return found
    top_k_index, order = top_k_index.sort(-1)
    weights, numbers = top_k_weights.gather(-1, order), top_k_index.reshape(-1)
    x = hidden_states.reshape(-1, 1, self.hidden_size).expand(-1, top_k_index.shape[1], -1).flatten(0, 1)
    y = self.mlp.activation_fn(self.mlp.w1(x, numbers)) * self.mlp.v1(x, numbers)
    y = self.mlp.w2(y, numbers).reshape(*top_k_index.shape, -1) * weights[..., None]
    summed: Tensor = y.sum(1).reshape(hidden_states.shape)
    return summed


ADAPTER = Dbrx
