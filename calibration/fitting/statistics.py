"""What calibration remembers of the inputs of one layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class LayerStatistics:
    """Running statistics of the inputs x (tokens, K) of one linear layer.

    Attributes:
        gram: Sum of ``x.T @ x`` over tokens, float32 (K, K) (each batch is summed in float32, batches add in place).
            Under autocast in bfloat16 on a CPU that multiplies bfloat16 it is that of x rounded to bfloat16, which is
            what the layer multiplies.
        mean_abs: Sum of ``|x|`` over tokens, float32 (K,).
        peak_mean_abs: Largest batch mean of ``|x|``, float32 (K,): the scale of LQER's official code.
        peak: Largest ``|x|``, float32 (K,).
        tokens: Number of tokens seen.
    """

    gram: Tensor
    mean_abs: Tensor
    peak_mean_abs: Tensor
    peak: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | None = None) -> LayerStatistics:
        """Return statistics of no tokens for K = ``in_features``, on the CPU unless a device is given."""
        zeros = torch.zeros(in_features, device=device)
        gram = torch.zeros(in_features, in_features, device=device)
        return cls(gram, zeros.clone(), zeros.clone(), zeros.clone())

    @classmethod
    def unseen(cls, in_features: int, device: torch.device | None = None) -> LayerStatistics:
        """Return `empty` statistics that take no memory and cannot be updated."""
        zero = torch.zeros((), device=device)
        row = zero.expand(in_features)
        return cls(zero.expand(in_features, in_features), row, row, row)

    def update(self, x: Tensor) -> None:
        """Add one batch of inputs (..., K), any floating dtype."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        magnitude = flat.abs()
        total = magnitude.sum(0)
        with _rounding_as_the_block_does(flat.device):
            self.gram.addmm_(flat.T, flat)
        self.mean_abs += total
        self.peak_mean_abs = torch.maximum(self.peak_mean_abs, total / max(1, len(flat)))
        self.peak = torch.maximum(self.peak, magnitude.amax(0))
        self.tokens += flat.shape[0]

    def add(self, other: LayerStatistics) -> None:
        """Become the statistics of the tokens of both, wherever the other ones are."""
        device = self.gram.device
        self.gram += other.gram.to(device)
        self.mean_abs += other.mean_abs.to(device)
        self.peak_mean_abs = torch.maximum(self.peak_mean_abs, other.peak_mean_abs.to(device))
        self.peak = torch.maximum(self.peak, other.peak.to(device))
        self.tokens += other.tokens

    def filled_up(self, others: LayerStatistics) -> LayerStatistics:
        """Return these statistics with the mean of others in the place of tokens that miss to K."""
        missing = len(self.gram) - self.tokens
        part = missing / others.tokens
        sums = {name: getattr(self, name) + part * getattr(others, name) for name in ("gram", "mean_abs")}
        shared = replace(self, **sums, tokens=len(self.gram))
        return shared if self.tokens else replace(shared, peak_mean_abs=others.peak_mean_abs, peak=others.peak)

    def divide(self, scale: Tensor) -> None:
        """Become the statistics of ``x / scale``, scale (K,) positive."""
        self.gram.div_(scale).div_(scale[:, None])
        for name in ("mean_abs", "peak_mean_abs", "peak"):
            setattr(self, name, getattr(self, name) / scale)

    def second_moment(self) -> Tensor:
        """Return ``E[x_j ** 2]``, float32 (K,)."""
        return self.gram.diagonal() / max(1, self.tokens)

    def mean_magnitude(self) -> Tensor:
        """Return ``E[|x_j|]``, float32 (K,)."""
        return self.mean_abs / max(1, self.tokens)


@contextmanager
def _rounding_as_the_block_does(device: torch.device) -> Iterator[None]:
    """Let products of float32 round their inputs to bfloat16 where a block's products on the CPU do; sums are exact.

    Autocast would round what is summed as well. A Gram matrix takes about two thirds of the time (docs/speed.md). The
    setting is one of the whole process: statistics are summed by one thread, while no other computes.
    """
    rounds = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    rounds = rounds and torch.get_autocast_dtype("cpu") == torch.bfloat16
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        try:
            if rounds:
                torch.set_float32_matmul_precision("medium")
            yield
        finally:
            if rounds:
                torch.set_float32_matmul_precision(before)
