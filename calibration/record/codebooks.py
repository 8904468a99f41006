"""Levels of the fixed weight formats: affine integers, NF4, MXINT."""

from __future__ import annotations

import torch
from torch import Tensor

from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT
from rankbook.calibration.settings import FORMATS

LEVEL_DTYPES = {"int8": torch.int8, "float16": torch.float16}

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat levels (QLoRA, Dettmers et al. 2023, appendix E)."""


def affine_levels(bits: int) -> Tensor:
    """Return 0 .. 2**bits - 1 shifted to be centred on zero where int8 asks for it, int8 (1, 2**bits)."""
    first = 0 if bits < 8 else -128
    return torch.arange(first, first + (1 << bits)).to(torch.int8)[None]


def symmetric_levels(bits: int) -> Tensor:
    """Return -2**(bits - 1) .. 2**(bits - 1) - 1, int8 (1, 2**bits)."""
    half = 1 << (bits - 1)
    return torch.arange(-half, half).to(torch.int8)[None]


def nf4_levels(dtype: torch.dtype) -> Tensor:
    """Return the NF4 levels (1, 16), times 63 and rounded where ``dtype`` is int8 (error at most 0.8 % of a level)."""
    levels = torch.tensor(_NF4)[None]
    if dtype == torch.int8:
        return (levels * (LEVEL_LIMIT[4] - 1)).round().to(torch.int8)
    return levels.to(dtype)


def mxint_levels(bits: int) -> Tensor:
    """Return the mantissas of MXINT in ascending order, int8 (1, 2**bits).

    Sign and magnitude with ``bits - 1`` mantissa bits (LQER, Zhang et al. 2024, official code): zero occurs twice.
    The value of a weight is ``mantissa * 2**(exponent - (bits - 1))``.
    """
    top = (1 << (bits - 1)) - 1
    magnitudes = torch.arange(0, top + 1)
    return torch.cat([-magnitudes.flip(0), magnitudes]).to(torch.int8)[None]


def check_format(weight_format: str, bits: int) -> None:
    """Check that a format exists in ``bits``.

    Raises:
        ValueError: Unknown format, or NF4 in other than 4 bits.
    """
    if weight_format not in FORMATS:
        raise ValueError(f"weight format {weight_format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if weight_format == "nf4" and bits != 4:
        raise ValueError(f"nf4 has 4 bits; {bits} were asked for. Choose --bits 4 or another weight format")
    if bits not in LEVEL_LIMIT:
        raise ValueError(f"{bits} bits are not supported; choose one of {', '.join(map(str, LEVEL_LIMIT))}")
