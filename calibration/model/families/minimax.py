"""MiniMax 01 and M1: lightning attention, whose state transformers keeps in a cache of the family's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter


class MiniMax(ModelAdapter):
    """The state of a linear layer is kept as in all other families, in a layer of the cache."""

    families = ("minimax",)

    def new_cache(self) -> Any:
        """Return a cache of the only class that the model takes, with the layers of its configuration."""
        from transformers.models.minimax.modeling_minimax import MiniMaxCache

        class Cache(MiniMaxCache):
            """Keeps states (batch, heads, keys, values) in layers."""

            def get_linear_cache(self, layer_idx: int) -> Tensor | None:
                layer: Any = self.layers[layer_idx]
                state: Tensor | None = layer.recurrent_states[0]
                return state

            def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
                layer: Any = self.layers[layer_idx]
                layer.update_recurrent_state(linear_cache)

        own: Any = Cache
        cache: Any = own()
        cache.layers = super().new_cache().layers
        return cache


ADAPTER = MiniMax
