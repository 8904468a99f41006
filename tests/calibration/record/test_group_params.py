"""Parameters of groups: 8 bits with a step and a base for each panel and plane, or floats; joined and cut by planes."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.record.group_params import GroupParams, panel_max, panel_range
from rankbook.plugins.forms import Form


def values(rows: int = 40, groups: int = 3, planes: int = 2) -> torch.Tensor:
    return torch.randn(rows, groups, planes, generator=torch.Generator().manual_seed(0))


def test_eight_bits_are_within_half_a_step() -> None:
    exact = values()
    stored = GroupParams.quantize(exact)
    step = panel_range(exact)[0].repeat_interleave(32, 0)[:40, None]
    assert stored.form is Form.INT8
    assert bool(((stored.dense() - exact).abs() <= step * 0.501).all())


@pytest.mark.parametrize(("bits", "form"), [(16, Form.FLOAT16), (32, Form.FLOAT32)])
def test_floats_are_kept_as_they_are(bits: int, form: Form) -> None:
    exact = values()
    stored = GroupParams.quantize(exact, bits)
    assert stored.form is form
    assert torch.equal(stored.dense(), exact.half().float() if bits == 16 else exact)


def test_powers_of_two_are_exact_within_seven_octaves() -> None:
    exponents = torch.randint(-9, -2, (40, 3, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(GroupParams.powers_of_two(exponents).dense(), exponents.float().exp2())


@pytest.mark.parametrize("bits", [8, 32])
def test_planes_are_cut_and_joined_again(bits: int) -> None:
    stored = GroupParams.quantize(values(), bits)
    again = GroupParams.joined([stored.planes(0, -1), stored.planes(-1, None)])
    assert torch.equal(again.dense(), stored.dense())


def test_whole_panels_of_rows_are_joined_below_each_other() -> None:
    top, rest = GroupParams.quantize(values(64)), GroupParams.quantize(values(5))
    assert torch.equal(GroupParams.joined([top, rest], 0).dense(), torch.cat([top.dense(), rest.dense()]))


def test_forms_do_not_mix() -> None:
    with pytest.raises(ValueError, match="all hold 8-bit codes or all hold values"):
        GroupParams.joined([GroupParams.quantize(values()), GroupParams.quantize(values(), 32)])
    with pytest.raises(ValueError, match="exactly one form"):
        GroupParams()
    with pytest.raises(ValueError, match="NaN or infinity"):
        GroupParams.quantize(values() / 0)


def test_the_largest_of_a_panel_includes_its_last_rows() -> None:
    rows = torch.arange(40.0)[:, None, None]
    assert panel_max(rows).flatten().tolist() == [31.0, 39.0]


def test_rows_beside_much_larger_ones_are_coarse_in_eight_bits() -> None:
    values = torch.rand(70, 4, 2, generator=torch.Generator().manual_seed(0)) + 1
    assert GroupParams.quantize(values).coarse_rows() == 0
    values[5] *= 100  # steps of 0.7 for scales of 1 to 2 in the first panel
    values[40], values[41] = 0, 0.9
    found = GroupParams.quantize(values)
    error = (found.dense() - values)[..., 0].abs().median(1).values / values[..., 0].median(1).values.clamp_min(1e-9)
    assert found.coarse_rows() == 31
    assert float(error[:32].max()) > 0.1
    assert float(error[32:].max()) < 0.01
    assert GroupParams.quantize(values, 16).coarse_rows() == 0
