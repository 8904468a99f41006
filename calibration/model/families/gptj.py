"""GPT-J, CodeGen and GPT-Neo: attention in a method of its own."""

from __future__ import annotations

from rankbook.calibration.model.adapter import ModelAdapter


class GptJ(ModelAdapter):
    """GPT-Neo alone has windows, in every other layer: how far they reach is a buffer of the attention."""

    families = ("gptj", "codegen", "gpt_neo")
    attention_method = "_attn"

    def windows(self) -> list[int]:
        """Return how many positions a query sees in each layer."""
        kinds = getattr(self.config, "attention_layers", ["global"] * self.layers)
        return [int(self.config.window_size) if kind == "local" else -1 for kind in kinds]


ADAPTER = GptJ
