"""LRQ: low-rank weight-scaling matrices that steer rounding (Lee et al. 2024, arXiv 2407.11534).

The result is a plain affine or symmetric record: the low-rank part costs nothing at inference. Groups, training with
few steps and the relative loss are this project's; ``compat`` goes back to the released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from rankbook.calibration.fitting import grids, rounding
from rankbook.calibration.fitting.grids import Grid
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.codebooks import affine_levels
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training.reconstruct import STEPS, TrainConfig, TrainingOptions, train_records
from rankbook.calibration.training.scaled_rounding import Divisors, ScaledRounding
from rankbook.plugins.widths import BITS

UNIFORM = ("affine", "symmetric")
_COMPAT_STEPS, _COMPAT_BATCH, _COMPAT_RATE = 5000, 2, 5e-4
_COMPAT_RANGES, _COMPAT_POWER = 100, 2.4
_NARROW, _WIDE = 4096, 8192


@dataclass(frozen=True)
class LrqConfig(TrainingOptions):
    """Options of LRQ."""

    bits: int = option(3, "bits of a code", choices=BITS)
    group_size: int = option(64, "weights of one row that share a scale")
    rank: int = option(0, "rank of the scaling matrices; 0 takes min(N, K) / 4")
    format: str = option("affine", "evenly spaced levels", choices=UNIFORM)
    clip_search: bool = option(True, "search the range of each group before training")
    param_bits: int = option(8, "bits of each parameter of a group: 8 or 16")
    seed: int = option(0, "seed of the batch order and of the scaling matrices")
    rate: float = option(0.0, "step size of the scaling matrices; 0 derives it from the steps")
    scale_rate: float = option(0.0, "step size of the grid's scales; 0 derives it from the steps")
    full_rank: bool = option(False, "a full scaling matrix: FlexRound")
    compat: bool = option(
        False,
        "follow the released code: its range search, rank 1024 or 2048, FlexRound for some shapes, 5000 steps"
        " of 2 sequences with one step size, plain squared error",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} is negative; choose at least 1, or 0 for min(N, K) / 4")
        if self.compat and self.format != "affine":
            raise ValueError("compat is the released code, which is asymmetric; leave the format at affine")
        self.grid()

    def grid(self) -> Grid:
        """Return the grid that training starts from."""
        return Grid(self.bits, self.group_size, self.format, self.clip_search, self.param_bits)

    def divisors(self, rows: int, columns: int) -> Divisors:
        """Return how the divisors of a layer (rows, columns) are learned."""
        steps = self.training_steps()
        if self.compat:
            scaling_rank = 0 if self.full_rank or _released_full(rows, columns) else _released_rank(rows, columns)
            rate = self.rate or _COMPAT_RATE
            return Divisors(scaling_rank, scaling_rank > 0, self.scale_rate or rate, rate, 1e-8)
        scaling_rank = 0 if self.full_rank else min(self.rank or max(1, min(rows, columns) // 4), rows, columns)
        default = _REACH / max(1, steps)
        return Divisors(scaling_rank, scaling_rank > 0, self.scale_rate or default, self.rate or default)

    def training_steps(self) -> int:
        """Return the training steps per block."""
        released = _COMPAT_STEPS if self.compat and self.effort != "fast" else 0
        return self.steps or released or STEPS[self.effort]

    def train_config(self) -> TrainConfig:
        """Return how blocks are trained."""
        if not self.compat:
            return super().train_config()
        return replace(super().train_config(), batch=max(self.batch, _COMPAT_BATCH), loss="square")


_REACH = 0.5
"""Default step size times the number of steps: twice what Adam can move a logarithm.

The released 5e-4 suits 5000 steps. One block of SmolLM2-135M, 3 bits, 60 steps, error relative to a start of 1: 0.55 at
0.24, 0.53 at 0.5, 0.55 at 1.2. Starting from codes chosen with error feedback ended no lower.
"""


def _released_rank(rows: int, columns: int) -> int:
    rank = 2048 if min(rows, columns) >= _WIDE else 1024
    return min(rank, rows, columns)


def _released_full(rows: int, columns: int) -> bool:
    """Return whether the released code silently learns a full matrix."""
    return min(rows, columns) <= _NARROW < max(rows, columns) or rows == columns == _WIDE


def quantize(problem: LayerProblem, config: LrqConfig) -> QuantizedLinear:
    """Round one layer on a searched grid: where training starts.

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    method = "flexround" if config.full_rank else "lrq"
    if not (config.compat and config.clip_search):
        return grids.round_nearest(problem, config.grid(), method)
    grouped = grids.grouped_weight(problem, config.group_size)
    levels = affine_levels(config.bits).to(grouped.device)
    scale, zero = _released_search(grouped, config.bits)
    params = grids.affine_params(scale, -zero - float(levels[0, 0]), config.param_bits)
    return grids.assemble(
        problem, rounding.nearest(grouped, grids.codebooks_of(levels, params)), levels, params, method
    )


def _released_search(grouped: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scales and zero points (G, N) of least ``mean |error| ** 2.4`` over 100 ranges and all zero points."""
    count = 1 << bits
    span = grouped.amax(1).clamp_min(0) - grouped.amin(1).clamp_max(0)

    def candidate(choice: float) -> tuple[Tensor, Tensor]:
        part, zero = divmod(int(choice), count)
        scale = span * ((_COMPAT_RANGES - part) / _COMPAT_RANGES / (count - 1))
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        return scale, torch.full_like(scale, zero)

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        codes = (grouped / scale[:, None]).round().clamp_(-float(zero[0, 0]), count - 1 - float(zero[0, 0]))
        return (codes * scale[:, None] - grouped).abs().pow_(_COMPAT_POWER).mean(1)

    scale, zero = grids.search(candidate, error, range(_COMPAT_RANGES * count))
    return scale, zero


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: LrqConfig
) -> dict[str, QuantizedLinear]:
    """Train codes and scales of a block, see `train_records`."""
    seeds = count(1000 * problem.seed)

    def layer(part: LayerProblem, record: QuantizedLinear) -> ScaledRounding:
        own: LrqConfig = problem.configs.get(part.name, config)  # a rule may have given it another rank
        return ScaledRounding(part.weight, record, own.divisors(*part.weight.shape), next(seeds))

    return train_records(problem, records, config, layer)


METHOD = Method("lrq", LrqConfig, quantize, refine, LrqConfig.trains)
