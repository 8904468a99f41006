"""Four-bit floats (E2M1) with scales for blocks: NVFP4 and MXFP4, as one table of 16 values and the scales."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rankbook.calibration.imports.base import table
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitudes of E2M1 (OCP Microscaling Formats 1.0, table 5); the fourth bit of a code is the sign."""
_BIAS, _NAN = 127, 255
"""Of E8M0."""


def e2m1(codes: Tensor, scales: Tensor, method: str) -> QuantizedLinear:
    """Return the record of codes (N, K) of E2M1 with scales (N, G) float32 for blocks of 16 or 32.

    NVFP4's scales are E4M3 numbers times one number of the tensor; the products have float32's digits.
    """
    return table(codes, _levels(), [scales.double() / 2], method)


def mxfp4(codes: Tensor, exponents: Tensor, method: str) -> QuantizedLinear:
    """Return the record of codes (N, K) of E2M1 with exponents (N, K / 32) uint8 in E8M0.

    A scale stays in 8 bits where the exponents of a panel of 32 rows lie within seven octaves.

    Raises:
        ValueError: An exponent is E8M0's NaN.
    """
    if bool((exponents == _NAN).any()):
        raise ValueError("a block's scale is NaN in E8M0; the checkpoint is damaged, download it again")
    powers = exponents.int() - _BIAS - 1  # levels are doubled
    record = table(codes, _levels(), [powers.double().exp2()], method)
    if record.params.shape[1] != powers.shape[1]:
        return record
    small = GroupParams.powers_of_two(powers[..., None])
    return replace(record, params=small) if torch.equal(small.dense(), record.params.dense()) else record


def _levels() -> Tensor:
    magnitudes = torch.tensor(_TWICE, dtype=torch.int8)
    return torch.cat([magnitudes, -magnitudes])[None]
