"""Phi-3 and Phi-4: query, key and value projection in one layer, in this order."""

from __future__ import annotations

from rankbook.calibration.model.adapter import CachedOutput, ModelAdapter


class Phi3(ModelAdapter):
    """Keys and values are the features of ``qkv_proj`` behind those of the queries."""

    families = ("phi3", "phi4_multimodal")

    def _cached_outputs(self) -> list[CachedOutput]:
        return [CachedOutput(module, self.heads * self.head_size, 2) for module in self._named("qkv_proj")]


ADAPTER = Phi3
