"""Finite numbers are told from others, in every dtype and without a copy."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.record.finite import is_finite

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    values = torch.zeros(5, 7)
    values[3, 4] = value
    assert not is_finite(values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_and_empty_values_pass(dtype: torch.dtype) -> None:
    assert is_finite(torch.linspace(-400, 400, 35).view(5, 7).to(dtype))
    assert is_finite(torch.empty(0, 3, dtype=dtype))
