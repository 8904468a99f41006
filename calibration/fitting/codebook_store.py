"""From fitted codebooks to the stored record: integer levels, refit on the Gram matrix, 8-bit parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbook.calibration.fitting import rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks, solve_ridge
from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT, GroupParams

TINY = torch.finfo(torch.float32).tiny


def round_levels(books: Codebooks, bits: int, level_dtype: str) -> Codebooks:
    """Round the levels to what is stored; shift and scale go to offset and coefficients, the codebooks stay.

    Integer levels are centred and scaled to fill the allowed range, so that seven bits lose least; those in float16 lie
    between 1 and 2 in magnitude, a power of two goes to the coefficients.
    """
    if level_dtype == "float16":
        unit = 2.0 ** torch.floor(torch.log2(books.levels.abs().amax(1, True).clamp_min(TINY)))  # exact to divide by
        return Codebooks((books.levels / unit).half().float(), books.coeffs * unit[..., None], books.offset)
    top = LEVEL_LIMIT[bits] - 1
    centre = (books.levels.amax(1, True) + books.levels.amin(1, True)) / 2
    scale = (books.levels - centre).abs().amax(1, True).clamp_min(TINY) / top
    levels = ((books.levels - centre) / scale).round()
    offset = books.offset + torch.einsum("pgn,p->gn", books.coeffs, centre[:, 0])
    return Codebooks(levels, books.coeffs * scale[..., None], offset)


def refit_params(
    grouped: Tensor, codes: Tensor, books: Codebooks, gram: Tensor, *, offset_only: bool = False
) -> Codebooks:
    """Improve coefficients and offset of one group after another for the layer's output error, codes and levels fixed.

    Block coordinate descent on ``tr((W - W_hat) H (W - W_hat).T)``: exact for a group given all the others.

    Args:
        grouped: Weights (G, group, N).
        codes: (G, group, N).
        books: Codebooks to start from.
        gram: Damped Gram matrix H (K, K).
        offset_only: Leave the coefficients as they are.
    """
    groups, group, rows = grouped.shape
    coeffs, offset = books.coeffs.clone(), books.offset.clone()
    residual = (grouped - rounding.lookup(books.dense(), codes)).view(groups * group, rows)
    for index in range(groups):
        part = slice(index * group, (index + 1) * group)
        own, across = gram[part, part], gram[part]
        if offset_only:  # the one feature is 1: its products are sums over the group
            change = solve_ridge(own.sum().expand(rows, 1, 1), (across.sum(0) @ residual)[:, None]).T
        else:
            features = _features(books.levels, codes[index])
            system = _products(features, own @ features)
            right = _products(features, (across @ residual)[None])
            change = solve_ridge(system, right[..., 0]).T  # (P + 1, N)
            coeffs[:, index] += change[:-1]
            for feature, step in zip(features[:-1], change[:-1], strict=True):
                residual[part].addcmul_(feature, step, value=-1)
        offset[index] += change[-1]
        residual[part] -= change[-1]
    return Codebooks(books.levels, coeffs, offset)


def _features(levels: Tensor, codes: Tensor) -> Tensor:
    """Return the levels (P, L) of codes (group, N) and, for the offset, ones: (P + 1, group, N)."""
    features = levels.new_ones(len(levels) + 1, *codes.shape)
    index = codes.long().flatten()
    for plane, values in zip(features, levels, strict=False):
        torch.index_select(values, 0, index, out=plane.view(-1))
    return features


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Sum products of (P, group, N) and (Q, group, N) over the group: (N, P, Q).

    Rows of a group stay innermost: products of small matrices, one for each row, are slow.
    """
    return torch.stack([torch.stack([(a * b).sum(0) for b in other], -1) for a in one], -2)


def to_params(books: Codebooks, bits: int) -> GroupParams:
    """Store coefficients and offset (8, 16 or 32 bits) as the planes of `GroupParams` (N, G, P + 1)."""
    return GroupParams.quantize(torch.cat([books.coeffs, books.offset[None]]).permute(2, 1, 0).contiguous(), bits)


def from_params(params: GroupParams, levels: Tensor) -> Codebooks:
    """Undo `to_params`: the codebooks that the stored numbers make."""
    dense = params.dense().permute(2, 1, 0).contiguous()
    return Codebooks(levels.float(), dense[:-1].contiguous(), dense[-1].contiguous())


def quantize_params(grouped: Tensor, codes: Tensor, books: Codebooks, gram: Tensor, bits: int) -> GroupParams:
    """Store the coefficients first, let the offset make up for their rounding, then store the offset."""
    stored = from_params(to_params(books, bits), books.levels)
    refit = refit_params(grouped, codes, Codebooks(stored.levels, stored.coeffs, books.offset), gram, offset_only=True)
    first, second = to_params(books, bits), to_params(refit, bits)
    return GroupParams.joined([first.planes(0, -1), second.planes(-1, None)])
