"""Rounding steered by learned divisors: the trainable layer behind LRQ and FlexRound.

    W_hat = s * clamp(round(W / (s * exp(S))))        s = s_0 * exp(delta), one per group

The grid stays affine with one scale and a fixed zero point per group; S (N, K) only moves weights to neighbouring grid
points and is thrown away after training. LRQ (Lee et al. 2024, arXiv 2407.11534): ``S = L U + row + column`` of low
rank; FlexRound (Lee et al. 2023): S has as many numbers as the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankbook.calibration.fitting import grids, rounding
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.calibration.training.learned_rounding import anchored, around_branch


@dataclass(frozen=True)
class Divisors:
    """How a layer's divisors are learned.

    Attributes:
        scaling_rank: Rank of L U; 0 for a full matrix.
        columns: Whether there is one number per input feature (not in FlexRound).
        scale_rate: Step size of the grid scales' logarithms.
        rate: Step size of S.
        epsilon: Of Adam; small against gradients of about 1e-9 unless the released code's is wanted.
    """

    scaling_rank: int
    columns: bool = True
    scale_rate: float = 1e-3
    rate: float = 1e-3
    epsilon: float = 1e-15


class ScaledRounding:
    """An affine or symmetric layer whose codes and scales are trained by Adam with cosine decay.

    Training starts exactly at the given record, as in `LearnedRounding`: a weight whose code is not its nearest level
    is anchored at the edge of the cell it was put in. An error branch stays as it is, and the codes are trained for
    what it leaves of the weight. A group of zeros, whose scale is zero, keeps its offset of zero.
    """

    def __init__(self, weight: Tensor, record: QuantizedLinear, divisors: Divisors, seed: int = 0) -> None:
        """Start from ``record`` (one row of uniform levels) of ``weight`` (N, K)."""
        self._start = record
        self._bits = 8 * record.params.values.element_size() if record.params.values is not None else 8
        codebooks = grids.codebooks_of(record.levels, record.params)
        grouped, self._branch = around_branch(weight, record)
        self._place = anchored(grouped, codebooks, rounding.to_groups(record.codes, record.group))
        dense = record.params.dense().permute(2, 1, 0)
        self._scale = dense[0].contiguous()
        self._shift = torch.zeros_like(self._scale)
        if record.has_offset:
            self._shift = torch.where(self._scale == 0, self._shift, dense[1] / self._scale)
        rows, columns = weight.shape
        self._delta = torch.zeros_like(self._scale)
        self._row = weight.new_zeros(rows, dtype=torch.float32)
        start = _start_matrices(rows, columns, divisors, seed)
        self._matrices = {name: matrix.to(weight.device) for name, matrix in start.items()}
        steered = [self._row, *self._matrices.values()]
        self._optimizer = torch.optim.Adam(
            [
                {"params": [self._delta], "rate": divisors.scale_rate},
                {"params": steered, "rate": divisors.rate},
            ],
            eps=divisors.epsilon,
        )
        self._moved, self._codebooks, self._decoded = self._place, codebooks, self._place

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded weight (N, K), a view with K strided; the error branch is added."""
        self._round()
        groups, group, rows = self._place.shape
        decoded = self._decoded.view(groups * group, rows).T
        return (decoded if self._branch is None else decoded + self._branch).to(dtype)

    def _round(self) -> Tensor:
        """Bring moved weights, codebooks and decoded weights up to date; return the codes."""
        self._moved = self._place * self._steering().neg_().exp_().view(self._place.shape)
        self._codebooks = grids.codebooks_of(self._start.levels, self._params())
        codes, self._decoded = rounding.rounded(self._moved, self._codebooks)
        return codes

    def _steering(self) -> Tensor:
        """Return S transposed, (K, N)."""
        parts = self._matrices
        steering = parts["full"] + self._row if "full" in parts else torch.addmm(self._row, parts["u"].T, parts["l"].T)
        return steering + parts["column"][:, None] if "column" in parts else steering

    def _params(self) -> GroupParams:
        scale = self._scale * self._delta.exp()
        if self._start.has_offset:
            return grids.affine_params(scale, self._shift, self._bits)
        return grids.store_plane(scale, self._bits)

    @torch.no_grad()
    def update(self, grad: Tensor, fraction: float) -> None:
        """Take one step of Adam; ``grad`` (N, K), ``fraction`` of the training left."""
        flow = grad.T.float().reshape(self._place.shape)
        gap = self._codebooks[:, 1:2] - self._codebooks[:, :1]
        low, high = (
            torch.minimum(self._codebooks[:, :1], self._codebooks[:, -1:]),
            self._codebooks.amax(1, keepdim=True),
        )
        # The clamp passes gradients to what rounds into the range (straight-through on round alone).
        inside = (self._moved >= low - gap.abs() / 2) & (self._moved <= high + gap.abs() / 2)
        moved = self._moved * inside
        self._delta.grad = (flow * (self._decoded - moved)).sum(1)
        pull = moved.mul_(flow).neg_().view(-1, self._row.numel())  # dL/dS transposed, (K, N)
        self._row.grad = pull.sum(0)
        parts = self._matrices
        if "full" in parts:
            parts["full"].grad = pull
        else:
            parts["l"].grad, parts["u"].grad = pull.T @ parts["u"].T, parts["l"].T @ pull.T
        if "column" in parts:
            parts["column"].grad = pull.sum(1)
        decay = 0.5 * (1 - math.cos(math.pi * fraction))
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * decay
        self._optimizer.step()

    def record(self) -> QuantizedLinear:
        """Return the state as it is stored."""
        return replace(self._start, codes=rounding.from_groups(self._round()), params=self._params())


def _start_matrices(rows: int, columns: int, divisors: Divisors, seed: int) -> dict[str, Tensor]:
    """Return parameters of S that make it zero: only U is not, so that the first step moves L alone."""
    parts: dict[str, Tensor] = {}
    if divisors.scaling_rank == 0:
        parts["full"] = torch.zeros(columns, rows)
    else:
        bound = 1 / math.sqrt(columns)
        generator = torch.Generator().manual_seed(seed)
        parts["u"] = torch.rand(divisors.scaling_rank, columns, generator=generator) * (2 * bound) - bound
        parts["l"] = torch.zeros(rows, divisors.scaling_rank)
    if divisors.columns:
        parts["column"] = torch.zeros(columns)
    return parts
