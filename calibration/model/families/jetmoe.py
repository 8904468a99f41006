"""JetMoE: mixtures of experts in the MLP, and in the projections of queries and of the attention's result."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter


class JetMoe(ModelAdapter):
    """Each matrix of all experts is a module with one ``weight`` (experts, out, in)."""

    families = ("jetmoe",)

    def unify_experts(self) -> None:
        """Describe the experts as other families do."""
        for module in self.model.modules():
            if hasattr(module, "input_linear") and hasattr(module, "output_linear"):
                for part in (module.input_linear, module.output_linear):
                    part.expert_matrices = {"weight": False}
                if hasattr(module, "map"):
                    module.map, module.reduce = types.MethodType(_map, module), types.MethodType(_reduce, module)
                else:
                    module.forward = types.MethodType(_mixture, module)


def _is_split(module: Any) -> bool:
    return "weight" not in module.input_linear._parameters


def _mixture(self: Any, layer_input: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts, (batch, length, hidden)."""
    if not _is_split(self):
        found: Tensor = type(self).forward(self, layer_input)
        return found
    x, numbers, weights = _routed(self.router, layer_input)
    gate, up = self.input_linear.weight(x, numbers).chunk(2, dim=-1)
    y: Tensor = self.output_linear.weight(self.activation(gate) * up, numbers)
    return _summed(y, weights, self.bias).reshape(layer_input.shape)


def _map(self: Any, layer_input: Tensor) -> Any:
    """Return the queries of the chosen experts (batch, length, k, size), nothing, and what `_reduce` has to know."""
    if not _is_split(self):
        return type(self).map(self, layer_input)
    x, numbers, weights = _routed(self.router, layer_input)
    queries = self.input_linear.weight(x, numbers)
    return queries.reshape(*layer_input.shape[:2], self.top_k, -1), None, (numbers, weights)


def _reduce(self: Any, layer_input: Tensor, topo_info: Any) -> Tensor:
    """Return what the chosen experts make of the results of their queries, (batch, length, hidden)."""
    if not _is_split(self):
        found: Tensor = type(self).reduce(self, layer_input, topo_info)
        return found
    numbers, weights = topo_info
    y = self.output_linear.weight(layer_input.reshape(-1, layer_input.shape[-1]), numbers)
    return _summed(y, weights, self.bias).reshape(*layer_input.shape[:2], -1)


def _routed(router: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens, each k times (tokens * k, hidden), the numbers of their experts, and weights (tokens, k)."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    scores, numbers = router.layer(x).float().topk(router.top_k, dim=1)
    weights = torch.softmax(scores, dim=1).type_as(x)
    numbers, order = numbers.sort(-1)
    rows = x[:, None].expand(-1, router.top_k, -1).flatten(0, 1)
    return rows, numbers.reshape(-1), weights.gather(-1, order)


def _summed(y: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return (y.reshape(*weights.shape, -1) * weights[..., None]).sum(1) + bias


ADAPTER = JetMoe
