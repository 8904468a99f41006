"""Closed-form codebooks: activation-weighted alternating least squares over codes, per-group parameters and levels.

``codebooks[g, l, n] = sum_p coeffs[p, g, n] * levels[p, l] + offset[g, n]`` (LCQ, Cai et al. 2024, ``C = S^T V - B``).
Weights are grouped (G, group, N), see `rankbook.calibration.fitting.rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankbook.calibration.fitting import native, rounding

_CHUNK = 1 << 22
"""Weights handled at a time; bounds the temporaries of a large layer."""
_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46)
_RIDGE = 1e-6


@dataclass
class Codebooks:
    """Codebooks of all groups of a layer while they are fitted.

    Attributes:
        levels: (P, L) float32.
        coeffs: (P, G, N) float32.
        offset: (G, N) float32.
    """

    levels: Tensor
    coeffs: Tensor
    offset: Tensor

    def dense(self) -> Tensor:
        """Return the codebooks (G, L, N)."""
        return torch.einsum("pgn,pl->gln", self.coeffs, self.levels) + self.offset[:, None]


@dataclass
class Moments:
    """What a set of codes says about the best codebooks: sums over the weights that carry code l.

    Attributes:
        mass: Sum of energies, (G, L, N).
        value: Sum of energy times weight, (G, L, N).
    """

    mass: Tensor
    value: Tensor


def moments_of(grouped: Tensor, energy: Tensor, codes: Tensor, levels: int) -> Moments:
    """Sum energies (G, group) and weighted weights (G, group, N) by code."""
    if (found := native.moments(grouped, energy, codes, levels)) is not None:
        return Moments(*found)
    groups, _, rows = grouped.shape
    mass = grouped.new_zeros(groups, levels, rows)
    value = torch.zeros_like(mass)
    for of_group, weights, each, chosen in zip(zip(mass, value, strict=True), grouped, energy, codes, strict=True):
        index, weighted = chosen.long(), each[:, None].expand(weights.shape)
        of_group[0].scatter_add_(0, index, weighted)
        of_group[1].scatter_add_(0, index, weighted * weights)
    return Moments(mass, value)


def nearest_chunked(grouped: Tensor, codebooks: Tensor) -> Tensor:
    """`rounding.nearest`, some rows at a time where that takes memory."""
    if (found := native.rounded(grouped, codebooks)) is not None:
        return found[0]
    parts = [
        rounding.nearest(grouped[..., p].contiguous(), codebooks[..., p].contiguous()) for p in _row_chunks(grouped)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def solve_params(moments: Moments, levels: Tensor) -> Codebooks:
    """Solve coefficients and offset of every group for given codes and levels (an (P + 1) x (P + 1) system each)."""
    basis = torch.cat([levels, torch.ones_like(levels[:1])])  # (P + 1, L)
    size = basis.shape[0]
    products = (basis[:, None] * basis[None]).reshape(size * size, -1)
    system = torch.einsum("gln,xl->gnx", moments.mass, products)
    system = system.view(*system.shape[:2], size, size)
    right = torch.einsum("gln,pl->gnp", moments.value, basis)
    solution = solve_ridge(system, right).movedim(-1, 0)  # (P + 1, G, N)
    return Codebooks(levels, solution[:-1].contiguous(), solution[-1].contiguous())


def solve_ridge(system: Tensor, right: Tensor, ridge: float = _RIDGE) -> Tensor:
    """Solve symmetric systems (..., n, n) with a small ridge, in float64; a group may leave levels unused."""
    exact = system.double()
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    floor = ridge * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    solution: Tensor = torch.linalg.solve(exact + torch.diag_embed(floor.expand_as(diagonal)), right.double())
    return solution.float()


def solve_levels(moments: Moments, books: Codebooks) -> Tensor:
    """Solve the levels (P, L) for given codes and parameters (a P x P system per level)."""
    coeffs = books.coeffs
    size = len(coeffs)
    pairs = (coeffs[:, None] * coeffs[None]).flatten(0, 1)
    system = torch.einsum("gln,xgn->lx", moments.mass, pairs).view(-1, size, size).double()
    right = torch.einsum("gln,pgn->lp", moments.value - moments.mass * books.offset[:, None], coeffs).double()
    # Pull towards the old level instead of zero, so that a level nobody uses stays where it was.
    mean = system.diagonal(dim1=1, dim2=2).mean() * _RIDGE + torch.finfo(torch.float32).tiny
    right = right + mean * books.levels.T.double()
    solution: Tensor = torch.linalg.solve(system + mean * torch.eye(size, device=system.device).double(), right)
    return solution.T.float().contiguous()


def clipped_grid(grouped: Tensor, energy: Tensor, count: int) -> Codebooks:
    """Start: uniform levels 0 .. count - 1 on the range of each group, shrunk to the least weighted error."""
    best: tuple[Tensor, Tensor, Tensor] | None = None
    low, high = grouped.amin(1), grouped.amax(1)
    for factor in _SHRINK:
        step = ((high - low) * (factor / (count - 1))).clamp_min(torch.finfo(torch.float32).tiny)
        first = (high + low) / 2 - step * ((count - 1) / 2)
        error = _grid_error(grouped, energy, step, first, count)
        if best is None:
            best = error, step, first
        else:
            better = error < best[0]
            new = (error, step, first)
            best = tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))  # type: ignore[assignment]
    if best is None:
        raise ValueError("no shrink factors to choose from")
    levels = torch.arange(count, dtype=torch.float32, device=grouped.device)
    return Codebooks(levels[None], best[1][None], best[2])


def _grid_error(grouped: Tensor, energy: Tensor, step: Tensor, first: Tensor, count: int) -> Tensor:
    error = torch.empty_like(step)
    for part in _row_chunks(grouped):
        inverse = (1 / step[:, part])[:, None]
        place = (grouped[..., part] - first[:, None, part]).mul_(inverse)
        off = place.round().clamp_(0, count - 1).sub_(place).square_()
        error[:, part] = rounding.weighted_sum(off, energy) * step[:, part].square()
    return error


def fit(grouped: Tensor, energy: Tensor, rank: int, count: int, rounds: int) -> Codebooks:
    """Fit codebooks of ``rank`` planes and ``count`` levels by alternating weighted least squares.

    Args:
        grouped: Weights (G, group, N).
        energy: Importance of each input (G, group), positive.
        rank: P, 1 to count - 1.
        count: L.
        rounds: Alternations, at least 1.
    """
    books = clipped_grid(grouped, energy, count)
    for at in range(rounds):
        codebooks = books.dense()
        moments = moments_of(grouped, energy, nearest_chunked(grouped, codebooks), count)
        if at == min(1, rounds - 1) and rank > 1:
            books.levels = grow_levels(moments, codebooks, books.levels, rank)
        books = solve_params(moments, books.levels)
        books = canonical(Codebooks(solve_levels(moments, books), books.coeffs, books.offset))
    return books


def fit_params(grouped: Tensor, energy: Tensor, levels: Tensor) -> Codebooks:
    """Fit the parameters of every group to given levels (P, L); arguments as in `fit`."""
    count = levels.shape[1]
    codebooks = clipped_grid(grouped, energy, count).dense()
    return solve_params(moments_of(grouped, energy, nearest_chunked(grouped, codebooks), count), levels)


def grow_levels(moments: Moments, codebooks: Tensor, levels: Tensor, rank: int) -> Tensor:
    """Add the leading directions in which free codebooks (one Lloyd step per group) differ from the present ones."""
    free = torch.where(moments.mass > 0, moments.value / moments.mass.clamp_min(1e-30), codebooks)
    basis = _orthonormal(torch.cat([torch.ones_like(levels[:1]), levels]))
    rest = free.movedim(1, -1).reshape(-1, free.shape[1])
    rest = rest - (rest @ basis.T) @ basis
    _, vectors = torch.linalg.eigh((rest.T @ rest).double())
    extra = vectors.flip(1).T[: rank - len(levels)].float()
    # Candidates outside the span of the present basis come first; complete them if the residual has too few directions.
    every = torch.eye(free.shape[1], device=free.device)
    return torch.cat([levels, _orthonormal(torch.cat([basis, extra, every]))[len(basis) :]])[:rank]


def _orthonormal(rows: Tensor) -> Tensor:
    """Gram-Schmidt over rows, dependent ones dropped."""
    kept: list[Tensor] = []
    for row in rows.double():
        rest = row
        for _ in range(2):
            for other in kept:
                rest = rest - (rest @ other) * other
        if rest.norm() > 1e-4 * max(float(row.norm()), torch.finfo(torch.float32).tiny):
            kept.append(rest / rest.norm())
    return torch.stack(kept).float()


def canonical(books: Codebooks) -> Codebooks:
    """Fix the gauge: plane 0 is the mean codebook shape, the others are orthonormal to it, to ones and to each other.

    Any invertible mixing of planes, and any constant moved between levels and offset, gives the same codebooks; without
    a fixed form the coefficients grow against each other and quantize badly.
    """
    mean = books.levels.mean(1, keepdim=True)
    offset = books.offset + torch.einsum("pgn,p->gn", books.coeffs, mean[:, 0])
    levels = books.levels - mean
    rank, count = levels.shape
    flat = books.coeffs.reshape(rank, -1)
    shape = flat.mean(1) @ levels  # mean over groups of the codebook without its offset
    if float(shape.norm()) == 0 or rank >= count:
        return books
    head = shape / shape.norm()
    target = [head]
    if rank > 1:
        cover = flat @ flat.T  # (P, P)
        rest = levels - (levels @ head)[:, None] * head
        _, vectors = torch.linalg.eigh((rest.T @ cover @ rest).double())
        span = _orthonormal(torch.cat([head[None], vectors.flip(1).T[: rank - 1].float()]))
        target = list(span)
    new_levels = torch.stack(target)
    if len(new_levels) < rank:
        return books
    mixing = levels @ new_levels.T  # levels = mixing @ new_levels
    return Codebooks(new_levels, torch.einsum("pq,pgn->qgn", mixing, books.coeffs).contiguous(), offset)


def _row_chunks(grouped: Tensor) -> list[slice]:
    groups, group, rows = grouped.shape
    size = max(1, _CHUNK // (groups * group))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
