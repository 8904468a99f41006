"""What float16 does not hold is stored in float32 and counted; small weights keep their value in every method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.solve import solve_layer
from rankbook.calibration.methods import METHODS
from rankbook.calibration.record import halves
from rankbook.calibration.record.quantized_linear import Factor, GroupParams, LowRank, QuantizedLinear
from rankbook.plugins.forms import Form
from tests.calibration import problems

NORMAL = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("values", "held"),
    [
        (NORMAL, True),
        (NORMAL * 1e-4, True),
        (NORMAL * 1e-6, False),
        (NORMAL * 1e-9, False),
        (NORMAL * 1e5, False),
        (torch.zeros(3), True),
        (torch.tensor([1.0, 1e-9]), True),  # what is nothing beside the rest may be lost
    ],
)
def test_what_float16_holds(values: torch.Tensor, held: bool) -> None:
    assert halves.holds(values) == held


def test_parameters_in_16_bits_are_float32_where_a_plane_would_be_lost() -> None:
    one_plane = NORMAL * torch.tensor([1.0, 1e-8])
    for values, form in ((NORMAL, Form.FLOAT16), (NORMAL * 1e-8, Form.FLOAT32), (one_plane, Form.FLOAT32)):
        params = GroupParams.quantize(values, 16)
        assert params.form is form
        # Half a unit in the last of the 11 bits of float16.
        torch.testing.assert_close(params.dense(), values, rtol=2.0**-11, atol=2.0**-25)
    assert torch.equal(GroupParams.quantize(one_plane, 16).dense(), one_plane)


def test_exponents_beyond_float16_are_exact() -> None:
    exponents = torch.tensor([-40.0, 20.0]).expand(4, 1, 2)
    assert torch.equal(GroupParams.powers_of_two(exponents, 16).dense(), exponents.exp2())


def test_factors_of_one_branch_have_one_form() -> None:
    down, up = NORMAL[:2, :, 0], NORMAL[:, :2, 1] * 1e-8
    branch = LowRank.joined(Factor.quantize(down, 16, 0), Factor.quantize(up, 16, 1))
    assert (branch.down.form, branch.up.form) == (Form.FLOAT32, Form.FLOAT32)
    assert torch.equal(branch.up.dense(), up)
    with pytest.raises(ValueError, match="both must have one form"):
        LowRank(Factor.quantize(down, 16, 0), Factor.quantize(up, 16, 1))


def relative_error(record: QuantizedLinear, weight: torch.Tensor) -> float:
    """Return the change of a weight relative to it."""
    change = record.weight(with_low_rank=True).double() - weight.double()
    return float(change.norm() / weight.double().norm())


OPTIONS: list[dict[str, Any]] = [
    *({"method": method} for method in METHODS),
    *({"method": "rtn", "weight_format": kind} for kind in ("symmetric", "nf4", "mxint")),
    *({"method": method, "param_bits": 16} for method in ("rtn", "lcq")),
    {"method": "lcq", "level_dtype": "float16"},
    {"method": "rtn", "weight_format": "nf4", "level_dtype": "float16", "param_bits": 16},
    {"method": "rtn", "weight_format": "mxint", "param_bits": 16},
    *({"method": "lcq", "error_branch": "qera", "factor_bits": bits} for bits in (8, 16)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("scale", [2.0**-27, 2.0**-40, 2.0**10])
def test_the_size_of_the_weights_does_not_matter(options: dict[str, Any], scale: float) -> None:
    chosen = QuantizeOptions(**{"bits": 4, "group_size": 32, **options})
    problem = problems.layer(32, 64)
    wanted = solve_layer(problem, chosen)
    found = solve_layer(replace(problem, weight=problem.weight * scale), chosen)
    # The weights are the same but for a power of two; rounding differs only near float16's limits.
    assert relative_error(found, problem.weight * scale) < 1.02 * relative_error(wanted, problem.weight) + 1e-4
    packed = {name: 8 * tensor.nbytes for name, tensor in found.pack().items() if name != "bias"}
    assert found.spec().stored_bits() == packed  # float32 where it was taken, counted
