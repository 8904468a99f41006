"""Phi-3 and Phi-4: query, key and value projection in one layer, in this order; LongRoPE."""

from __future__ import annotations

from rankbook.calibration.model.adapter import CachedOutput, ModelAdapter


class Phi3(ModelAdapter):
    """Keys and values are the features of ``qkv_proj`` behind those of the queries; long texts differ."""

    families = ("phi3", "phi4_multimodal")

    def _cached_outputs(self) -> list[CachedOutput]:
        return [CachedOutput(module, self.heads * self.head_size, 2) for module in self._named("qkv_proj")]

    def restart_at(self) -> int:
        """Return the original context: LongRoPE scales all positions in another way beyond it."""
        return int(getattr(self.config, "original_max_position_embeddings", None) or 0)


ADAPTER = Phi3
