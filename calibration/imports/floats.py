"""Small floats as tables: E2M1 of four bits with scales for blocks (NVFP4, MXFP4), and E4M3 of eight (FP8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankbook.calibration.imports.base import ImportRefusedError, Numbers

TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of E2M1 by code (OCP Microscaling Formats 1.0, table 5): the fourth bit is the sign."""
_LEVELS = torch.tensor([TWICE_E2M1], dtype=torch.int8)
_BIAS, _NAN = 127, 255
"""Of E8M0."""
_NAN_E4M3 = 127
"""The code of NaN in E4M3 without its sign; there is no infinity."""


def nvfp4(codes: Tensor, scales: Tensor, factor: Tensor | float, method: str) -> Numbers:
    """Return a layer of codes (N, K) of E2M1 with scales (N, G) for blocks of 16, and what they are multiplied by.

    Args:
        codes: (N, K) uint8.
        scales: In E4M3, or in float32 where the factor was applied in another way.
        factor: One number of the tensor, float32. The products with it have float32's digits.
        method: What the record says that it was made with.

    Raises:
        ImportRefusedError: Several factors.
    """
    one = torch.as_tensor(factor).float()
    if one.numel() != 1:
        raise ImportRefusedError(
            f"its scale of the whole tensor is {tuple(one.shape)}, one for each of several layers that lie in it, and"
            " which rows are whose is not said; export them apart with the tool that wrote them"
        )
    factors = (one.reshape(1) / 2).expand(len(codes))  # levels are doubled
    return Numbers(codes, 4, [scales.float()], method, levels=_LEVELS, factors=factors)


def mxfp4(codes: Tensor, exponents: Tensor, method: str) -> Numbers:
    """Return a layer of codes (N, K) of E2M1 with exponents (N, K / 32) uint8 in E8M0.

    Raises:
        ValueError: An exponent is E8M0's NaN.
    """
    powers = exponents_of(exponents) - 1  # levels are doubled
    return Numbers(codes, 4, [powers.exp2()], method, levels=_LEVELS, octaves=True)


def exponents_of(stored: Tensor) -> Tensor:
    """Return the exponents, float64, that are stored in E8M0 as uint8 or as a dtype of its own.

    Raises:
        ImportRefusedError: Another dtype, or one of them is E8M0's NaN.
    """
    if stored.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise ImportRefusedError(f"its scales are {stored.dtype}; those of MX formats are exponents in uint8 (E8M0)")
    exponents = stored.view(torch.uint8)
    if bool((exponents == _NAN).any()):
        raise ImportRefusedError("a block's scale is NaN in E8M0; the checkpoint is damaged, download it again")
    return exponents.double() - _BIAS


def e4m3(weight: Tensor, scales: Tensor, block: tuple[int, int] | None, method: str) -> Numbers:
    """Return a layer of weights in E4M3 with scales: 256 values that float16 holds.

    Args:
        weight: (N, K) float8_e4m3fn.
        scales: One, (N, 1) or (N, G) of rows, or (ceil(N / A), ceil(K / B)) of blocks.
        block: A and B where scales are of blocks, else None.
        method: What the record says that it was made with.

    Raises:
        ImportRefusedError: Another dtype, scales of another shape, or a weight that is NaN.
    """
    if weight.dtype != torch.float8_e4m3fn or weight.ndim != 2:
        raise ImportRefusedError(f"its weight is {weight.dtype} {tuple(weight.shape)}; what is read is float8_e4m3fn")
    codes = weight.view(torch.uint8)
    if bool(((codes & _NAN_E4M3) == _NAN_E4M3).any()):
        raise ImportRefusedError("a weight is NaN in E4M3; the checkpoint is damaged, download it again")
    scales = scales.double() if scales.dtype.itemsize > 1 else exponents_of(scales).exp2()  # MXFP8
    levels = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).half().nan_to_num(0.0)[None]
    return Numbers(codes, 8, [scales_of_rows(scales, weight.shape, block)], method, levels=levels)


def scales_of_rows(scales: Tensor, shape: torch.Size, block: tuple[int, int] | None) -> Tensor:
    """Return scales (N, G) for the groups of every row, from one, those of rows or those of blocks.

    Raises:
        ImportRefusedError: They have another shape.
    """
    rows, columns = shape
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(rows, 1)
    if block is not None and tuple(scales.shape) == (-(-rows // block[0]), -(-columns // block[1])):
        group = math.gcd(columns, block[1])
        return scales[torch.arange(rows) // block[0]][:, torch.arange(0, columns, group) // block[1]]
    if scales.shape[0] == rows and scales.ndim <= 2:
        return scales.reshape(rows, -1)
    raise ImportRefusedError(f"its scales {tuple(scales.shape)} are not those of a weight {tuple(shape)}")
