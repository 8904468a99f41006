"""Codes chosen with error feedback: what one column loses, the columns after it make up for.

GPTQ (Frantar et al. 2023, algorithm 1) onto given codebooks of any shape, with the columns in order of falling input
energy. The Gram matrix of the inputs says how one column can stand in for another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.fitting import native, rounding
from rankbook.calibration.fitting.problem import LayerProblem

_BLOCK, _PART = 64, 16
"""Columns whose errors reach the columns after them in one product, and those within which each is spread at once."""
_DAMPING = 0.01


def damped_gram(gram: Tensor, damping: float = _DAMPING) -> Tensor:
    """Return a Gram matrix (K, K) with ``damping`` times its mean diagonal added, ready to be inverted.

    Inputs that never were active get the mean energy, so that their weights are simply rounded.
    """
    result = gram.to(torch.float32, copy=True)
    result.diagonal().add_(_added(result.diagonal(), damping))
    return result


def _added(diagonal: Tensor, damping: float) -> Tensor:
    """Return what damping adds to the diagonal (K,) of a Gram matrix."""
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(diagonal <= 0, mean, torch.zeros_like(mean)) + damping * mean


def scaled_gram(problem: LayerProblem, damping: float) -> Tensor:
    """Return the damped Gram matrix of a layer's inputs with mean diagonal near 1; the identity without statistics.

    Raises:
        ValueError: The statistics or the weights hold NaN or infinity.
    """
    problem.check()
    gram = problem.statistics.gram.float()
    mean = gram.diagonal().mean()
    if problem.statistics.tokens == 0 or float(mean) <= 0:
        return torch.eye(problem.weight.shape[1], device=gram.device)
    scaled = gram / mean
    scaled.diagonal().add_(_added(scaled.diagonal(), damping))
    return scaled


@dataclass(frozen=True)
class Plan:
    """What the Gram matrix says about the columns of a layer.

    Attributes:
        order: Columns in the order of rounding, (K,).
        factor: Upper Cholesky factor of the inverse Gram matrix in that order, (K, K).
    """

    order: Tensor
    factor: Tensor


def plan(gram: Tensor, damping: float = _DAMPING, *, by_energy: bool = True) -> Plan:
    """Prepare rounding with inputs of Gram matrix (K, K): columns of most energy first, or as they stand.

    Raises:
        ValueError: The matrix holds NaN or infinity.
    """
    energy = gram.diagonal()
    order = energy.argsort(descending=True) if by_energy else torch.arange(len(gram), device=gram.device)
    return Plan(order, inverse_factor(gram, order, damping))


def inverse_factor(gram: Tensor, order: Tensor, damping: float = _DAMPING) -> Tensor:
    """Return the upper Cholesky factor (K, K) of the inverse Gram matrix in the given column order.

    Besides the given matrix, two of its size are in memory at a time: those of wide layers are large.
    """
    added = _added(gram.diagonal().float(), damping)[order]
    for extra in (0.0, 0.1, 1.0):
        ordered = gram[order[:, None], order].float()
        ordered.diagonal().add_(added)
        if extra:
            ordered.diagonal().add_(_added(ordered.diagonal(), extra))
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(ordered)
        del ordered
        if not int(failed):
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not int(failed):
                return factor
    raise ValueError("the Gram matrix of the inputs cannot be inverted; it holds NaN or infinity")


def assign(grouped: Tensor, codebooks: Tensor, columns: Plan) -> Tensor:
    """Choose codes for grouped weights so that the layer's output error is small.

    Args:
        grouped: Weights (G, group, N) float32.
        codebooks: Codebooks (G, L, N) float32.
        columns: Order and weights of the columns, see `plan`.

    Returns:
        Codes (G, group, N) uint8.
    """
    groups, group, rows = grouped.shape
    ordered, code_of_rank = rounding.sort_codebooks(codebooks.contiguous())
    bounds = rounding.midpoints(ordered)
    order, factor = columns.order, columns.factor
    work = grouped.reshape(groups * group, rows)[order]
    ranks = torch.empty_like(work, dtype=torch.uint8)
    cells = _Cells(ordered, bounds, order // group)
    errors = torch.empty_like(work[:_BLOCK])
    for start in range(0, len(work), _BLOCK):
        stop = min(start + _BLOCK, len(work))
        for first in range(start, stop, _PART):
            part = slice(first, min(first + _PART, stop))
            found = errors[first - start : part.stop - start]
            _assign_part(work[part], ranks[part], cells, factor[part, part], first, found)
            work[part.stop : stop].addmm_(factor[part, part.stop : stop].T, found, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    result = torch.empty_like(ranks)
    result[order] = ranks
    result = result.view(groups, group, rows)
    return result if code_of_rank is None else code_of_rank.gather(1, result.long()).to(torch.uint8)


@dataclass(frozen=True)
class _Cells:
    """Where the weights of each column are rounded to.

    Attributes:
        codebooks: Sorted codebooks (G, L, N).
        bounds: The boundaries of their cells (G, L - 1, N).
        groups: The group of each column, in the order of rounding, (K,) int64.
    """

    codebooks: Tensor
    bounds: Tensor
    groups: Tensor


def _assign_part(work: Tensor, ranks: Tensor, cells: _Cells, factor: Tensor, first: int, errors: Tensor) -> None:
    """Round a few columns in turn, each error spread over those after it.

    Args:
        work: What is left of their weights, (columns, N); changed.
        ranks: Becomes the ranks that were chosen, (columns, N).
        cells: Of all columns.
        factor: The factor (columns, columns) within them.
        first: Number of the first one.
        errors: Becomes their errors, (columns, N).
    """
    groups = cells.groups[first : first + len(work)]
    if native.feedback(work, ranks, errors, (cells.codebooks, cells.bounds, groups), factor):
        return
    rows = zip(work.unbind(), ranks.unbind(), errors.unbind(), factor.unbind(), groups.tolist(), strict=True)
    for place, (value, rank, error, weights, index) in enumerate(rows):
        found = rounding.search_column(value, cells.bounds[index])
        rank.copy_(found)
        torch.sub(value, cells.codebooks[index].gather(0, found[None])[0], out=error).div_(weights[place])
        work[place + 1 :].sub_(weights[place + 1 :, None] * error)
