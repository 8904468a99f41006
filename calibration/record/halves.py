"""Where float16 holds numbers and where it does not; what it does not hold stays in float32, and counts as such."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CHANGE = 2.0**-9
"""Change of the norm of numbers up to which float16 holds them; its rounding alone changes less than 2**-11."""
SMALLEST = 2.0**-15
"""Largest magnitude below which float16 does not hold numbers: it rounds them to multiples of 2**-24."""

_CHUNK = 1 << 22


class NotHeldError(ValueError):
    """Numbers that float16 does not hold."""


def holds(values: Tensor) -> bool:
    """Return whether float16 holds numbers: none becomes infinite, and together they hardly change.

    Numbers far below the largest may be lost, as in every sum with them; a set of numbers that are all below float16's
    smallest (6e-8), or near it, is not held.
    """
    exact = change = 0.0
    for part in torch.split(values.reshape(-1), _CHUNK):  # in parts: an embedding in float64 may not fit into memory
        wide = part.double()
        exact += float(wide.square().sum())
        change += float((wide - wide.half().double()).square().sum())
    return change <= LARGEST_CHANGE**2 * exact


def stored(values: Tensor, *, axis: int) -> Tensor:
    """Return numbers as float16, or as float32 if it does not hold each part of them along ``axis``."""
    fits = all(holds(part) for part in values.unbind(axis))
    return values.to(torch.float16 if fits else torch.float32).contiguous()


def narrowed(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in the type of a model's activations.

    Raises:
        NotHeldError: The type is float16, which does not hold them.
    """
    if dtype == torch.float16 and not holds(values):
        peak = float(values.abs().max())
        raise NotHeldError(
            f"float16 does not hold {name}, whose largest magnitude is {peak:.3g} (it reaches from 6e-8 to 65504);"
            " export with --dtype bf16 or fp32"
        )
    return values.to(dtype)
