"""Families whose own attention adds a mask of keys to its scores, and asks nothing else where a text ends."""

from __future__ import annotations

from rankbook.calibration.model.adapter import ModelAdapter


class Masked(ModelAdapter):
    """BLOOM (biases that grow with the place of a key: a softmax knows differences alone), Falcon, XGLM and others."""

    families = ("bloom", "falcon", "gpt_neox_japanese", "xglm")
    sees_by_mask = True


ADAPTER = Masked
