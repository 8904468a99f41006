"""Small floats and their scales as tables."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.imports.base import ImportRefusedError
from rankbook.calibration.imports.floats import e4m3, exponents_of, mxfp4, scales_of_rows


def test_every_finite_value_of_e4m3_is_a_level() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    weight = torch.cat([codes, codes[:2]])[None].view(torch.float8_e4m3fn)
    record = e4m3(weight, torch.ones(1), None, "test").record()
    assert torch.equal(record.weight(), weight.float())
    with pytest.raises(ImportRefusedError, match="NaN in E4M3"):
        e4m3(torch.full((1, 32), 255, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(1), None, "test")
    with pytest.raises(ImportRefusedError, match=r"torch\.float8_e5m2"):
        e4m3(torch.ones(1, 32).to(torch.float8_e5m2), torch.ones(1), None, "test")


def test_scales_of_e8m0_are_powers_of_two_in_either_dtype() -> None:
    stored = torch.tensor([[120, 127, 130]], dtype=torch.uint8)
    assert exponents_of(stored).tolist() == [[-7, 0, 3]]
    assert exponents_of(stored.view(torch.float8_e8m0fnu)).tolist() == [[-7, 0, 3]]
    weight = torch.ones(1, 96).to(torch.float8_e4m3fn)
    assert torch.equal(e4m3(weight, stored, None, "test").record().weight()[0, ::32], torch.tensor([2.0**-7, 1, 8]))
    for wrong in (torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ImportRefusedError, match="exponents in uint8"):
            mxfp4(torch.zeros(1, 32, dtype=torch.uint8), stored.to(wrong), "test")


def test_scales_beyond_seven_octaves_take_16_bits() -> None:
    codes = torch.full((32, 64), 5, dtype=torch.uint8)
    exponents = torch.full((32, 2), 120, dtype=torch.uint8)
    assert mxfp4(codes, exponents, "test").record().params.form.name == "INT8"
    exponents[0, 0] = 112
    record = mxfp4(codes, exponents, "test").record()
    assert record.params.form.name == "FLOAT16"
    assert record.weight()[0].tolist() == [3 * 2.0**-15] * 32 + [3 * 2.0**-7] * 32


def test_scales_of_blocks_are_spread_over_rows() -> None:
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = scales_of_rows(scales, torch.Size((3, 48)), (2, 32))
    assert found.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert scales_of_rows(torch.ones(3), torch.Size((3, 48)), None).shape == (3, 1)
