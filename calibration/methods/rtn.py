"""RTN: every weight to the nearest level of a fixed format, with an optional search of the clipping range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.fitting import rounding
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import Options, option
from rankbook.calibration.record.codebooks import (
    LEVEL_DTYPES,
    affine_levels,
    check_format,
    mxint_levels,
    nf4_levels,
    symmetric_levels,
)
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from rankbook.calibration.settings import EFFORTS, FORMATS
from rankbook.plugins.layer_spec import check_group
from rankbook.plugins.widths import BITS

_SHRINK = tuple(1 - 0.04 * step for step in range(16))


@dataclass(frozen=True)
class RtnConfig(Options):
    """Options of rounding to nearest."""

    bits: int = option(4, "bits of a code", choices=BITS)
    group_size: int = option(64, "weights of one row that share a scale")
    format: str = option("affine", "fixed levels", choices=FORMATS)
    clip_search: bool = option(False, "search the range of each group by weighted error")
    param_bits: int = option(8, "bits of each number of a group: 8 or 16")
    level_dtype: str = option("int8", "storage of NF4 levels; int8 uses 7 bits", choices=tuple(LEVEL_DTYPES))
    effort: str = option("default", "accepted for uniformity; rounding has one effort", choices=EFFORTS)
    seed: int = option(0, "accepted for uniformity; rounding is deterministic")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_format(self.format, self.bits)
        if self.param_bits not in (8, 16, 32):
            raise ValueError(f"param_bits {self.param_bits} is not supported; choose 8 or 16")


def quantize(problem: LayerProblem, config: RtnConfig) -> QuantizedLinear:
    """Round one layer.

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    grouped = grouped_weight(problem, config.group_size)
    energy = input_energy(problem, config.group_size) if config.clip_search else None
    levels, params = grid(grouped, energy, config)
    codes = rounding.nearest(grouped, tables_of(levels, params))
    return assemble(problem, codes, levels, params, "rtn")


def grouped_weight(problem: LayerProblem, group: int) -> Tensor:
    """Return the weight as groups (G, group, N).

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    if not bool(torch.isfinite(problem.weight).all()):
        raise ValueError(f"the weights of {problem.name} hold NaN or infinity; repair or re-download the model")
    check_group(problem.weight.shape[1], group)
    return rounding.to_groups(problem.weight.float(), group)


def grid(grouped: Tensor, energy: Tensor | None, config: RtnConfig) -> tuple[Tensor, GroupParams]:
    """Return the levels and the stored parameters of a format's grid for grouped weights (G, group, N).

    Args:
        grouped: The weights.
        energy: Mean square of each input (G, group) for the search of the range, or None for none.
        config: Format, bits and storage.
    """
    make = {"affine": _affine, "symmetric": _symmetric, "nf4": _nf4, "mxint": _mxint}[config.format]
    return make(grouped, energy, config)


def tables_of(levels: Tensor, params: GroupParams) -> Tensor:
    """Return the codebooks (G, L, N) that one row of levels and stored parameters (N, G, 1 or 2) make."""
    dense = params.dense().permute(2, 1, 0)
    tables = levels.float()[0][:, None] * dense[0][:, None]
    return tables + dense[1][:, None] if len(dense) == 2 else tables


def assemble(problem: LayerProblem, codes: Tensor, levels: Tensor, params: GroupParams, method: str) -> QuantizedLinear:
    """Return the record of codes (G, group, N) on a grid of `grid`."""
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


def _affine(grouped: Tensor, energy: Tensor | None, config: RtnConfig) -> tuple[Tensor, GroupParams]:
    """Asymmetric integers with an integer zero point: ``scale * (code - zero)`` on a range that contains 0."""
    top = (1 << config.bits) - 1
    low, high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)

    def candidate(shrink: float) -> tuple[Tensor, Tensor]:
        scale = ((high - low) * (shrink / top)).clamp_min(1e-9)
        return scale, (-low * shrink / scale).round()

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        codes = ((grouped / scale[:, None]).round() + zero[:, None]).clamp_(0, top)
        return _weighted((codes - zero[:, None]) * scale[:, None] - grouped, energy)

    scale, zero = search(candidate, error, _choices(energy))
    levels = affine_levels(config.bits)
    return levels, affine_params(scale, -zero - float(levels[0, 0]), config.param_bits)


def affine_params(scale: Tensor, shift: Tensor, bits: int) -> GroupParams:
    """Store scales and offsets ``shift * scale``, both (G, N).

    The offset is a multiple of the *stored* scale, so that a weight of zero stays next to zero.
    """
    stored = store_plane(scale, bits)
    return GroupParams.joined([stored, store_plane(stored.dense()[..., 0].T * shift, bits)])


def _symmetric(grouped: Tensor, energy: Tensor | None, config: RtnConfig) -> tuple[Tensor, GroupParams]:
    """Signed integers times a scale; the range is the largest magnitude."""
    half = 1 << (config.bits - 1)
    peak = grouped.abs().amax(1)

    def candidate(shrink: float) -> tuple[Tensor, ...]:
        return ((peak * (shrink / max(half - 1, 1))).clamp_min(1e-9),)

    def error(scale: Tensor) -> Tensor:
        codes = (grouped / scale[:, None]).round().clamp_(-half, half - 1)
        return _weighted(codes * scale[:, None] - grouped, energy)

    (scale,) = search(candidate, error, _choices(energy))
    return symmetric_levels(config.bits), store_plane(scale, config.param_bits)


def _nf4(grouped: Tensor, energy: Tensor | None, config: RtnConfig) -> tuple[Tensor, GroupParams]:
    """NF4 levels times the largest magnitude (QLoRA, Dettmers et al. 2023)."""
    levels = nf4_levels(LEVEL_DTYPES[config.level_dtype])
    table = levels.float()[0] / float(levels.float().max())
    peak = grouped.abs().amax(1).clamp_min(1e-9)

    def error(scale: Tensor) -> Tensor:
        tables = table[None, :, None] * scale[:, None]
        return _weighted(rounding.lookup(tables, rounding.nearest(grouped, tables)) - grouped, energy)

    (scale,) = search(lambda shrink: (peak * shrink,), error, _choices(energy))
    return levels, store_plane(scale / float(levels.float().max()), config.param_bits)


def _mxint(grouped: Tensor, energy: Tensor | None, config: RtnConfig) -> tuple[Tensor, GroupParams]:
    """Block floating point: a power of two per block (LQER, Zhang et al. 2024, official code).

    ``exponent = ceil(log2 max|w|)`` and ``bits - 1`` mantissa bits, sign and magnitude; a maximum that is a power of
    two saturates. With a clipping search the exponent may also be one or two less.
    """
    mantissa = config.bits - 1
    peak = grouped.abs().amax(1)
    smallest = peak[peak > 0].min() if bool((peak > 0).any()) else torch.ones(())
    peak = torch.where(peak > 0, peak, smallest)
    exponent = peak.log2().ceil().clamp_(-126, 127) - mantissa
    top = (1 << mantissa) - 1

    def error(place: Tensor) -> Tensor:
        codes = (grouped / place.exp2()[:, None]).round().clamp_(-top, top)
        return _weighted(codes * place.exp2()[:, None] - grouped, energy)

    (exponent,) = search(lambda shrink: (exponent - shrink,), error, _choices(energy, (0.0, 1.0, 2.0)))
    return mxint_levels(config.bits), GroupParams.powers_of_two(exponent.T[..., None], config.param_bits)


def _weighted(error: Tensor, energy: Tensor | None) -> Tensor:
    """Sum squared errors (G, group, N) over each group, weighted by energy (G, group): (G, N)."""
    squared = error.square()
    return squared.sum(1) if energy is None else torch.einsum("gjn,gj->gn", squared, energy)


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


METHOD = Method("rtn", RtnConfig, quantize)
