"""Levels of the fixed formats."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.record import codebooks
from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_format_fits_the_integer_levels(bits: int) -> None:
    formats = [codebooks.affine_levels(bits), codebooks.symmetric_levels(bits), codebooks.mxint_levels(bits)]
    if bits == 4:
        formats.append(codebooks.nf4_levels(torch.int8))
    for levels in formats:
        assert levels.shape == (1, 1 << bits)
        assert levels.dtype == torch.int8
        assert int(levels.min()) >= -LEVEL_LIMIT[bits]
        assert int(levels.max()) <= LEVEL_LIMIT[bits] - 1
        assert bool((levels.int().diff() >= 0).all())


def test_mxint_has_two_zeros_and_all_mantissas() -> None:
    assert codebooks.mxint_levels(2).tolist() == [[-1, 0, 0, 1]]
    assert codebooks.mxint_levels(3).tolist() == [[-3, -2, -1, 0, 0, 1, 2, 3]]


def test_integer_nf4_is_close_to_nf4() -> None:
    exact = codebooks.nf4_levels(torch.float16).float()
    # Half a step of 1 / 63.
    assert float((codebooks.nf4_levels(torch.int8).float() / 63 - exact).abs().max()) <= 0.5 / 63 + 1e-3


def test_formats_are_checked() -> None:
    codebooks.check_format("nf4", 4)
    with pytest.raises(ValueError, match="nf4 has 4 bits"):
        codebooks.check_format("nf4", 3)
    with pytest.raises(ValueError, match="affine, symmetric, nf4, mxint"):
        codebooks.check_format("int", 3)
    with pytest.raises(ValueError, match="choose one of 2, 3, 4, 8"):
        codebooks.check_format("affine", 5)
