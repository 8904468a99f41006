"""Learned rounding onto trained codebooks: the trainable layer behind block training.

Parameters are multiplicative corrections of the coefficients, additive corrections of the offset (in units of the
group's mean gap between levels) and of the levels, and a rounding offset per weight that is added before the
nearest-level search and dropped after training (the offset is AutoRound's, Cheng et al. 2023, arXiv 2309.05516; the
corrections are this project's). The forward value is the *stored* one: integer levels, 8-bit parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankbook.calibration.fitting import codebook_store, rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks
from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT, GroupParams, QuantizedLinear


@dataclass(frozen=True)
class StepSizes:
    """Total movement allowed over training is half of each number (linear decay).

    They suit a start by error feedback. Steps ten times as large suit a start by nearest levels; here they undo a
    good part of its gain: block error 0.034 instead of 0.030, from 0.037, at 3 bits.

    Attributes:
        rounding: Rounding offsets, in gaps.
        coeffs: Coefficients, relative.
        offset: Offsets, in gaps.
        levels: Levels, in mean absolute levels of their plane.
    """

    rounding: float = 0.5
    coeffs: float = 0.05
    offset: float = 0.03
    levels: float = 0.01


class LearnedRounding:
    """A layer whose codes, parameters and levels are trained by sign gradient descent.

    Training starts exactly at the given record: a weight whose code is not its nearest level (error feedback) is
    anchored at the edge of the cell it was put in. An error branch stays as it is and the codes are trained for what it
    leaves of the weight: on SmolLM2-135M that left 5 % less block error than fitting the branch after training, as
    little as training the branch too, and anchors from the weight without the branch 10 % less than from all of it.
    """

    def __init__(self, weight: Tensor, record: QuantizedLinear, steps: int, sizes: StepSizes | None = None) -> None:
        """Start from ``record`` of ``weight`` (N, K), for ``steps`` updates."""
        self._start, self._sizes, self._steps = record, sizes or StepSizes(), steps
        self._books = codebooks_of(record)
        codebooks = self._books.dense()
        grouped, self._branch = around_branch(weight, record)
        self._codes = rounding.to_groups(record.codes, record.group)
        self._gap = ((codebooks.amax(1) - codebooks.amin(1)) / (codebooks.shape[1] - 1))[:, None].contiguous()
        self._place = anchored(grouped, codebooks, self._codes)
        self._scale = torch.ones_like(self._books.coeffs)
        self._shift = torch.zeros_like(self._books.offset)
        self._levels = self._books.levels.clone()
        self._level_size = self._books.levels.abs().mean(1, keepdim=True)
        self._params: GroupParams | None = None
        self._codebooks = codebooks

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded weight (N, K), a view with K strided; the error branch is added."""
        self._codebooks = self._present().dense().contiguous()
        wanted = dtype if self._branch is None else torch.float32
        self._codes, decoded = rounding.rounded(self._place, self._codebooks, wanted)
        groups, group, rows = self._place.shape
        decoded = decoded.view(groups * group, rows).T
        return decoded if self._branch is None else (decoded + self._branch).to(dtype)

    def _present(self) -> Codebooks:
        params_bits = 8 if self._start.params.codes is not None else 16
        books = Codebooks(
            self._stored_levels(), self._books.coeffs * self._scale, self._books.offset + self._gap[:, 0] * self._shift
        )
        self._params = codebook_store.to_params(books, params_bits)
        return codebook_store.from_params(self._params, books.levels)

    def _stored_levels(self) -> Tensor:
        if self._start.levels.dtype != torch.int8:
            return self._levels.to(self._start.levels.dtype).float()
        limit = LEVEL_LIMIT[self._start.bits]
        return self._levels.round().clamp_(-limit, limit - 1)

    @torch.no_grad()
    def update(self, grad: Tensor, fraction: float) -> None:
        """Take one sign step on every parameter; ``grad`` (N, K)."""
        step = fraction / self._steps
        flow = grad.T.reshape(self._place.shape)
        move = self._gap[:, 0] * (step * self._sizes.rounding)
        by_code = rounding.step(self._place, flow, self._codes, move, self._codebooks.shape[1])
        levels = self._stored_levels()
        coeffs = self._books.coeffs * self._scale
        slope = self._books.coeffs * torch.einsum("gln,pl->pgn", by_code, levels)
        self._scale.sub_(slope.sign_(), alpha=step * self._sizes.coeffs)
        self._shift.sub_(by_code.sum(1).sign_(), alpha=step * self._sizes.offset)
        slope = torch.einsum("gln,pgn->pl", by_code, coeffs)
        self._levels -= step * self._sizes.levels * self._level_size * slope.sign_()

    def record(self) -> QuantizedLinear:
        """Return the state as it is stored."""
        books = self._present()
        codes = rounding.nearest(self._place, books.dense())
        if self._params is None:
            raise ValueError("the layer has no parameters yet")
        levels = books.levels.to(self._start.levels.dtype)
        return replace(
            self._start, codes=rounding.from_groups(codes), levels=levels, params=self._params, has_offset=True
        )


def codebooks_of(record: QuantizedLinear) -> Codebooks:
    """Return the working form of a record's codebooks; a format without offset gets one of zero."""
    dense = record.params.dense().permute(2, 1, 0).contiguous()
    coeffs = dense[: record.planes].contiguous()
    offset = dense[record.planes] if record.has_offset else torch.zeros_like(coeffs[0])
    return Codebooks(record.levels.float(), coeffs, offset.contiguous())


def around_branch(weight: Tensor, record: QuantizedLinear) -> tuple[Tensor, Tensor | None]:
    """Return what the codes of a record stand for, and its error branch.

    Args:
        weight: (N, K).
        record: Of the weight.

    Returns:
        The weight less the branch as groups (G, group, N), and the branch (N, K), None where there is none.
    """
    branch = None if record.low_rank is None else record.low_rank.dense()
    rest = weight.float() if branch is None else weight.float() - branch
    return rounding.to_groups(rest, record.group), branch


def anchored(grouped: Tensor, codebooks: Tensor, codes: Tensor) -> Tensor:
    """Move each weight (G, group, N) to the nearest point of the cell that its code stands for."""
    ordered, order = rounding.sort_codebooks(codebooks)
    bounds = rounding.midpoints(ordered)
    infinite = torch.full_like(bounds[:, :1], torch.inf)
    low, high = torch.cat([-infinite, bounds], 1), torch.cat([bounds, infinite], 1)
    width = (ordered[:, -1:] - ordered[:, :1]) * 1e-4
    place = torch.empty_like(grouped)
    for index, (weights, chosen) in enumerate(zip(grouped, codes, strict=True)):  # indexes take eight bytes each
        ranks = chosen.long() if order is None else order[index].argsort(0).gather(0, chosen.long())
        inside = torch.maximum(weights, low[index].gather(0, ranks) + width[index])
        torch.minimum(inside, high[index].gather(0, ranks) - width[index], out=place[index])
    return place
