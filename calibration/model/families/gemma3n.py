"""Gemma 3n: some of its blocks keep the largest activations alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.model.adapter import ModelAdapter


class Gemma3n(ModelAdapter):
    """Where activations are cut off follows from their mean and deviation."""

    families = ("gemma3n", "gemma3n_text")

    def make_traceable(self) -> None:
        """Compute the quantile of the normal distribution now: ONNX has no inverse of the error function."""
        normal: Any = torch.distributions.normal.Normal(0, 1)  # its methods are untyped
        for module in self.model.modules():
            if share := getattr(module, "activation_sparsity", 0):
                deviations = float(normal.icdf(torch.tensor(share, dtype=torch.float32)))
                module._gaussian_topk = functools.partial(_largest, deviations)


def _largest(deviations: float, x: Tensor) -> Tensor:
    """Return by how much elements exceed a bound of the last dimension: its mean and so many deviations."""
    bound = x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, unbiased=False) * deviations
    return torch.relu(x - bound)


ADAPTER = Gemma3n
