"""Grids of fixed formats: levels, scales and offsets for the groups of a layer, and rounding to them.

The range of a group is what its weights span, or the best of some smaller ones (a clipping search).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.fitting import feedback, rounding
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.record.codebooks import (
    LEVEL_DTYPES,
    affine_levels,
    check_format,
    mxint_levels,
    nf4_levels,
    symmetric_levels,
)
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.plugins.layer_spec import check_group

_SHRINK = tuple(1 - 0.04 * step for step in range(16))


@dataclass(frozen=True)
class Grid:
    """Which grid weights are rounded to, and how it is stored.

    Attributes:
        bits: Bits of a code.
        group_size: Weights of one row that share a scale.
        format: One of `rankbook.calibration.settings.FORMATS`.
        clip_search: Whether the range of each group is searched by weighted error.
        param_bits: Bits of each number of a group: 8 or 16; 32 for tests of the algebra.
        level_dtype: Storage of NF4 levels, a name of `LEVEL_DTYPES`.

    Raises:
        ValueError: At construction, for a format that does not exist in this width, or other bits of the parameters.
    """

    bits: int
    group_size: int
    format: str = "affine"
    clip_search: bool = False
    param_bits: int = 8
    level_dtype: str = "int8"

    def __post_init__(self) -> None:
        check_format(self.format, self.bits)
        if self.param_bits not in (8, 16, 32):
            raise ValueError(f"param_bits {self.param_bits} is not supported; choose 8 or 16")


def round_nearest(problem: LayerProblem, grid: Grid, method: str) -> QuantizedLinear:
    """Round one layer to the nearest levels; ``method`` is what the record says it was made with.

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    grouped, levels, params = fit(problem, grid)
    return assemble(problem, rounding.nearest(grouped, codebooks_of(levels, params)), levels, params, method)


def round_with_feedback(
    problem: LayerProblem, grid: Grid, method: str, *, damping: float = 0.01, by_energy: bool = True
) -> QuantizedLinear:
    """Round one layer with error feedback, columns of most input energy first or as they stand.

    The grids of all groups are set before the first column is rounded.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    grouped, levels, params = fit(problem, grid)
    columns = feedback.plan(feedback.scaled_gram(problem, damping), 0.0, by_energy=by_energy)
    codes = feedback.assign(grouped, codebooks_of(levels, params), columns)
    return assemble(problem, codes, levels, params, method)


def grouped_weight(problem: LayerProblem, group: int) -> Tensor:
    """Return the weight as groups (G, group, N).

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    problem.check()
    check_group(problem.weight.shape[1], group)
    return rounding.to_groups(problem.weight.float(), group)


def fit(problem: LayerProblem, grid: Grid) -> tuple[Tensor, Tensor, GroupParams]:
    """Return the weights as groups (G, group, N), the levels and the stored parameters of their grid.

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    grouped = grouped_weight(problem, grid.group_size)
    energy = input_energy(problem, grid.group_size) if grid.clip_search else None
    make = {"affine": _affine, "symmetric": _symmetric, "nf4": _nf4, "mxint": _mxint}[grid.format]
    levels, params = make(grouped, energy, grid)
    return grouped, levels.to(grouped.device), params


def codebooks_of(levels: Tensor, params: GroupParams) -> Tensor:
    """Return the codebooks (G, L, N) that one row of levels and stored parameters (N, G, 1 or 2) make."""
    dense = params.dense().permute(2, 1, 0)
    codebooks = levels.float()[0][:, None] * dense[0][:, None]
    return codebooks + dense[1][:, None] if len(dense) == 2 else codebooks


def assemble(problem: LayerProblem, codes: Tensor, levels: Tensor, params: GroupParams, method: str) -> QuantizedLinear:
    """Return the record of codes (G, group, N) on a grid of `fit`."""
    return QuantizedLinear(
        codes=rounding.from_groups(codes),
        bits=int(levels.shape[1]).bit_length() - 1,
        levels=levels,
        params=params,
        has_offset=params.shape[2] == 2,
        bias=problem.bias,
        method=method,
    )


def input_energy(problem: LayerProblem, group: int) -> Tensor:
    """Return the mean square of each input (G, group); ones where no input was seen."""
    moment = problem.statistics.second_moment()
    return (moment if float(moment.max()) > 0 else torch.ones_like(moment)).view(-1, group)


def _affine(grouped: Tensor, energy: Tensor | None, grid: Grid) -> tuple[Tensor, GroupParams]:
    """Asymmetric integers with an integer zero point: ``scale * (code - zero)`` on a range that contains 0."""
    top = (1 << grid.bits) - 1
    low, high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)

    def candidate(shrink: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * (shrink / top)).clamp_min(torch.finfo(torch.float32).tiny)
        return scale, (-low * shrink / scale).round()

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        codes = ((grouped / scale[:, None]).round() + zero[:, None]).clamp_(0, top)
        return _weighted((codes - zero[:, None]) * scale[:, None] - grouped, energy)

    scale, zero = search(candidate, error, _choices(energy))
    levels = affine_levels(grid.bits)
    return levels, affine_params(scale, -zero - float(levels[0, 0]), grid.param_bits)


def affine_params(scale: Tensor, shift: Tensor, bits: int) -> GroupParams:
    """Store scales and offsets ``shift * scale``, both (G, N).

    The offset is a multiple of the *stored* scale, so that a weight of zero stays next to zero.
    """
    stored = store_plane(scale, bits)
    return GroupParams.joined([stored, store_plane(stored.dense()[..., 0].T * shift, bits)])


def _symmetric(grouped: Tensor, energy: Tensor | None, grid: Grid) -> tuple[Tensor, GroupParams]:
    """Signed integers times a scale; the range is the largest magnitude."""
    half = 1 << (grid.bits - 1)
    peak = grouped.abs().amax(1)

    def candidate(shrink: float) -> tuple[Tensor, ...]:
        return ((peak * (shrink / max(half - 1, 1))).clamp_min(torch.finfo(torch.float32).tiny),)

    def error(scale: Tensor) -> Tensor:
        codes = (grouped / scale[:, None]).round().clamp_(-half, half - 1)
        return _weighted(codes * scale[:, None] - grouped, energy)

    (scale,) = search(candidate, error, _choices(energy))
    return symmetric_levels(grid.bits), store_plane(scale, grid.param_bits)


def _nf4(grouped: Tensor, energy: Tensor | None, grid: Grid) -> tuple[Tensor, GroupParams]:
    """NF4 levels times the largest magnitude (QLoRA, Dettmers et al. 2023)."""
    levels = nf4_levels(LEVEL_DTYPES[grid.level_dtype])
    codebook = (levels.float()[0] / float(levels.float().max())).to(grouped.device)
    peak = grouped.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)

    def error(scale: Tensor) -> Tensor:
        codebooks = codebook[None, :, None] * scale[:, None]
        return _weighted(rounding.lookup(codebooks, rounding.nearest(grouped, codebooks)) - grouped, energy)

    (scale,) = search(lambda shrink: (peak * shrink,), error, _choices(energy))
    return levels, store_plane(scale / float(levels.float().max()), grid.param_bits)


def _mxint(grouped: Tensor, energy: Tensor | None, grid: Grid) -> tuple[Tensor, GroupParams]:
    """Block floating point: a power of two per block (LQER, Zhang et al. 2024, official code).

    ``exponent = ceil(log2 max|w|)`` and ``bits - 1`` mantissa bits, sign and magnitude; a maximum that is a power of
    two saturates. With a clipping search the exponent may also be one or two less.
    """
    mantissa = grid.bits - 1
    peak = grouped.abs().amax(1)
    smallest = peak[peak > 0].min() if bool((peak > 0).any()) else peak.new_ones(())
    peak = torch.where(peak > 0, peak, smallest)
    exponent = peak.log2().ceil().clamp_(-126, 127) - mantissa
    top = (1 << mantissa) - 1

    def error(place: Tensor) -> Tensor:
        codes = (grouped / place.exp2()[:, None]).round().clamp_(-top, top)
        return _weighted(codes * place.exp2()[:, None] - grouped, energy)

    (exponent,) = search(lambda shrink: (exponent - shrink,), error, _choices(energy, (0.0, 1.0, 2.0)))
    return mxint_levels(grid.bits), GroupParams.powers_of_two(exponent.T[..., None], grid.param_bits)


def _weighted(error: Tensor, energy: Tensor | None) -> Tensor:
    """Sum squared errors (G, group, N) over each group, weighted by energy (G, group): (G, N)."""
    squared = error.square()
    return squared.sum(1) if energy is None else rounding.weighted_sum(squared, energy)


def search(
    candidate: Callable[[float], tuple[Tensor, ...]],
    error: Callable[..., Tensor],
    choices: Sequence[float],
) -> tuple[Tensor, ...]:
    """Return the candidate (tensors (G, N)) with the least error in each group."""
    best = candidate(choices[0])
    if len(choices) == 1:
        return best
    least = error(*best)
    for choice in choices[1:]:
        trial = candidate(choice)
        found = error(*trial)
        better = found < least
        least = torch.where(better, found, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(trial, best, strict=True))
    return best


def _choices(energy: Tensor | None, choices: Sequence[float] = _SHRINK) -> Sequence[float]:
    """Return the choices, the first one alone where no search is wanted (no energies)."""
    return choices if energy is not None else choices[:1]


def store_plane(values: Tensor, bits: int) -> GroupParams:
    """Store one number per group (G, N) as a plane (N, G, 1)."""
    return GroupParams.quantize(values.T[..., None].contiguous(), bits)
