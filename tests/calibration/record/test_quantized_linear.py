"""The central record: its formula against a triple loop, exact storage, and validation at construction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rankbook.calibration.record.group_params import panel_range
from rankbook.calibration.record.quantized_linear import (
    LEVEL_LIMIT,
    Factor,
    GroupParams,
    LowRank,
)
from rankbook.plugins.layer_spec import allowed_groups, check_group
from tests.calibration.records import FORMS, random_record


@pytest.mark.parametrize("form", FORMS)
def test_weight_is_the_formula(form: str) -> None:
    record = random_record(**{**FORMS[form], "out_features": 3})
    params, levels, planes = record.params.dense(), record.levels.float(), record.planes
    weight = record.weight()
    for n in range(3):
        for k in range(record.in_features):
            row = params[n, k // record.group]
            want = sum(float(row[p]) * float(levels[p, int(record.codes[n, k])]) for p in range(planes))
            want += float(row[planes]) if record.has_offset else 0.0
            assert float(weight[n, k]) == pytest.approx(want, rel=1e-5, abs=1e-6)  # float32 sums


@pytest.mark.parametrize("form", FORMS)
def test_the_branch_adds_the_product_of_its_factors(form: str) -> None:
    record = random_record(**FORMS[form])
    difference = record.weight(with_low_rank=True) - record.weight()
    branch = record.low_rank
    want = torch.zeros_like(difference) if branch is None else branch.up.dense() @ branch.down.dense()
    assert torch.allclose(difference, want, atol=1e-6)


def test_stored_bits_count_every_byte_but_the_bias() -> None:
    record = random_record(64, 96, bits=3, planes=2, group=48, rank=4, bias=True)
    assert record.spec().stored_bits() == {
        "codes": 3 * 64 * 96,
        "levels": 8 * 2 * 8,
        "params": 8 * 64 * 2 * 3,
        "step": 32 * 2 * 3,
        "base": 32 * 2 * 3,
        "down": 8 * 4 * 96,
        "down_scale": 32 * 4,
        "up": 8 * 64 * 4,
        "up_scale": 32 * 4,
    }
    assert record.bits_per_weight() == sum(record.spec().stored_bits().values()) / (64 * 96)
    assert sum(8 * t.nbytes for name, t in record.pack().items() if name != "bias") == sum(
        record.spec().stored_bits().values()
    )


def test_eight_bit_params_are_within_half_a_step() -> None:
    values = torch.randn(70, 5, 3)
    step, _ = panel_range(values)
    error = (GroupParams.quantize(values).dense() - values).abs()
    # Half a step by rounding, and float32 rounding of code * step + base.
    assert (error <= step.repeat_interleave(32, 0)[:70, None] * 0.501).all()


def test_constant_params_are_exact() -> None:
    values = torch.full((40, 2, 1), 0.37)
    assert torch.allclose(GroupParams.quantize(values).dense(), values, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_factor_in_eight_bits_keeps_each_rank_within_its_scale(axis: int) -> None:
    values = torch.randn(6, 40) * torch.logspace(0, 5, 6)[:, None]
    values = values if axis == 0 else values.T.contiguous()
    factor = Factor.quantize(values, 8, axis)
    scale: Any = factor.scale
    assert ((factor.dense() - values).abs() <= scale * 0.501).all()


@pytest.mark.parametrize(
    ("columns", "groups"),
    [(576, [16, 32, 48, 64, 96, 144, 192, 576]), (48, [16, 48]), (50, [50]), (256, [16, 32, 64, 128, 256])],
)
def test_allowed_groups(columns: int, groups: list[int]) -> None:
    assert allowed_groups(columns) == groups
    with pytest.raises(ValueError, match="choose one of"):
        check_group(columns, 24)


def test_invalid_records_are_refused() -> None:
    record = random_record(bits=3)
    limit = LEVEL_LIMIT[3]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"bits": 5}, "5 bits"),
        ({"codes": record.codes.int()}, "codes are"),
        ({"codes": torch.full_like(record.codes, 8)}, "below 8"),
        ({"levels": record.levels[:, :4]}, "4 columns"),
        ({"levels": torch.full_like(record.levels, limit)}, "integer levels must lie"),
        ({"levels": record.levels.float()}, "levels are"),
        ({"levels": torch.full((2, 8), torch.nan, dtype=torch.float16)}, "NaN"),
        ({"has_offset": False}, "planes"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"codes": record.codes[:, :32]}, "params have shape|cannot cut"),
        ({"low_rank": LowRank(Factor(values=torch.zeros(2, 40)), Factor(values=torch.zeros(40, 2)))}, "does not fit"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(record, **changes)


def test_invalid_parts_are_refused() -> None:
    values = torch.zeros(4, 2, 1)
    for wrong in (
        GroupParams,
        lambda: GroupParams(codes=values.to(torch.int8)),
        lambda: GroupParams(codes=values.to(torch.int8), step=torch.zeros(2, 1), base=torch.zeros(2, 1)),
        lambda: GroupParams.quantize(values * torch.nan),
        lambda: GroupParams.quantize(values, 4),
        Factor,
        lambda: Factor.quantize(values[..., 0], 4, 0),
        lambda: LowRank(Factor(values=torch.zeros(2, 4)), Factor(values=torch.zeros(4, 3))),
    ):
        with pytest.raises(ValueError, match=r"give|need|hold|supported|agree|has shape"):
            wrong()
