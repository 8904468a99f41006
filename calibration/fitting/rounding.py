"""Groups of weights and the nearest entry of each group's codebook.

Inside the methods, weights are kept *grouped*: (G, group, N), output rows innermost. Each level of a group is then N
contiguous values, so that a search is a few vectorized comparisons instead of a scalar search per weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankbook.calibration.fitting import native

_COMPARE_LEVELS = 16
"""Up to this many levels a search compares with every midpoint; above, it bisects with gathers."""
_AT_ONCE = 1 << 15
"""Weights whose cells are searched at a time: they stay in the cache of a core meanwhile."""


def to_groups(weight: Tensor, group: int) -> Tensor:
    """Return a weight (N, K) as groups (G, group, N), contiguous."""
    rows, columns = weight.shape
    return weight.T.contiguous().view(columns // group, group, rows)


def from_groups(grouped: Tensor) -> Tensor:
    """Undo `to_groups`: (G, group, N) to (N, K), contiguous."""
    groups, group, rows = grouped.shape
    return grouped.reshape(groups * group, rows).T.contiguous()


def weighted_sum(values: Tensor, energy: Tensor) -> Tensor:
    """Sum values (G, group, N) over each group, weighted by energy (G, group): (G, N)."""
    return (energy[:, None] @ values)[:, 0]


def sort_codebooks(codebooks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Sort codebooks (G, L, N) along their levels.

    Returns:
        The sorted codebooks, and the code of each sorted entry (None where all codebooks were already in order).
    """
    if bool((codebooks[:, 1:] >= codebooks[:, :-1]).all()):
        return codebooks, None
    values, order = codebooks.sort(dim=1, stable=True)
    return values, order


def midpoints(codebooks: Tensor) -> Tensor:
    """Return the cell boundaries (G, L - 1, N) of sorted codebooks (G, L, N)."""
    # Codebooks made by einsum have their levels innermost, and strided boundaries are compared one by one.
    return ((codebooks[:, 1:] + codebooks[:, :-1]) * 0.5).contiguous()


def search(values: Tensor, bounds: Tensor) -> Tensor:
    """Count the boundaries below each value.

    Args:
        values: (G, group, N).
        bounds: Sorted cell boundaries (G, L - 1, N).

    Returns:
        Ranks (G, group, N) uint8; a value on a boundary belongs to the lower cell.
    """
    cells = bounds.shape[1]
    if cells + 1 > _COMPARE_LEVELS:
        return _bisect(values, bounds).to(torch.uint8)
    ranks = torch.empty_like(values, dtype=torch.uint8)
    groups = max(1, _AT_ONCE // values[0].numel())
    for some, edges, found in zip(*(torch.split(all_, groups) for all_ in (values, bounds, ranks)), strict=True):
        # PyTorch compares with vector instructions only where the result is of the type of the values.
        count = torch.gt(some, edges[:, :1], out=torch.empty_like(some))
        above = torch.empty_like(some)
        for cell in range(1, cells):
            count += torch.gt(some, edges[:, cell : cell + 1], out=above)
        found.copy_(count)
    return ranks


def search_column(values: Tensor, bounds: Tensor) -> Tensor:
    """`search` for one weight of each row: values (N,), bounds (L - 1, N), ranks (N,) int64.

    All boundaries are compared at once: for so few values the calls cost more than the comparisons.
    """
    if len(bounds) + 1 > _COMPARE_LEVELS:
        return _bisect(values[None, None], bounds[None])[0, 0]
    # As in `search`, a comparison is fast where its result is of the type of the values.
    return torch.gt(values, bounds, out=torch.empty_like(bounds)).sum(0).long()


def _bisect(values: Tensor, bounds: Tensor) -> Tensor:
    ranks = torch.zeros_like(values, dtype=torch.long)
    stride = (bounds.shape[1] + 1) // 2
    while stride:
        ranks += stride * (values > bounds.gather(1, ranks + (stride - 1)))
        stride //= 2
    return ranks


def nearest(values: Tensor, codebooks: Tensor) -> Tensor:
    """Return the code of the codebook entry nearest to each value.

    Args:
        values: (G, group, N).
        codebooks: (G, L, N) with L a power of two, in any order.

    Returns:
        Codes (G, group, N) uint8. Of two equally near entries the smaller one is taken.
    """
    if (found := native.rounded(values, codebooks)) is not None:
        return found[0]
    ordered, order = sort_codebooks(codebooks)
    ranks = search(values, midpoints(ordered))
    return ranks if order is None else order.gather(1, ranks.long()).to(torch.uint8)


def rounded(values: Tensor, codebooks: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the codes of `nearest`, and the entries that they stand for in ``dtype``."""
    if (found := native.rounded(values, codebooks, dtype)) is not None and found[1] is not None:
        return found[0], found[1]
    codes = nearest(values, codebooks)
    return codes, lookup(codebooks, codes).to(dtype)


def step(place: Tensor, flow: Tensor, codes: Tensor, move: Tensor, levels: int) -> Tensor:
    """Move weights against the sign of their gradient, and sum up the gradient by code.

    Args:
        place: Weights (G, group, N), contiguous, changed.
        flow: Their gradient (G, group, N), float32 or bfloat16.
        codes: (G, group, N) uint8.
        move: How far the weights of a group move, (G, N), not negative.
        levels: L.

    Returns:
        Sums (G, L, N) float32.
    """
    if (found := native.stepped(place, flow, codes, move, levels)) is not None:
        return found
    flow = flow.float()
    groups, _, rows = place.shape
    sums = place.new_zeros(groups, levels, rows).scatter_add_(1, codes.long(), flow)
    place.sub_(flow.sign().mul_(move[:, None]))
    return sums


def lookup(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Return the codebook entries (G, group, N) of codes (G, group, N) in codebooks (G, L, N)."""
    values = codebooks.new_empty(codes.shape)
    for some, chosen, found in zip(codebooks, codes, values, strict=True):  # indexes take eight bytes each
        torch.gather(some, 0, chosen.long(), out=found)
    return values
