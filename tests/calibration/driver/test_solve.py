"""One layer in the driver: the error branch, and alternating with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.solve import solve_layer
from rankbook.calibration.methods import METHODS
from tests.calibration import problems


def _lost(**changes: Any) -> float:
    problem = problems.layer(96, 128)
    values: dict[str, Any] = {"method": "rtn", "bits": 3, "group_size": 64, "error_branch": "qera", "error_rank": 16}
    record = solve_layer(problem, QuantizeOptions(**{**values, **changes}))
    return problems.output_error(problem, record.weight(with_low_rank=True))


@pytest.mark.parametrize("method", ["rtn", "lcq", "gptq"])
def test_alternating_with_the_branch_never_loses(method: str) -> None:
    errors = [_lost(method=method, branch_passes=passes) for passes in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    if method == "rtn":
        assert errors[2] < 0.95 * errors[0]


def test_one_pass_is_the_method_and_then_the_branch() -> None:
    problem = problems.layer(48, 128)
    options = QuantizeOptions(method="lcq", bits=3, group_size=64, error_branch="qera", error_rank=8)
    record = solve_layer(problem, options)
    alone = METHODS["lcq"].quantize(problem, options.method_config(128))
    assert torch.equal(record.codes, alone.codes)
    assert record.low_rank is not None
    assert record.low_rank.branch_rank == 8


def test_methods_with_a_branch_of_their_own_are_told_of_the_passes() -> None:
    assert QuantizeOptions(method="lqer", branch_passes=3).method_config().passes == 3
    with pytest.raises(ValueError, match="branch_passes is 0; give at least 1"):
        QuantizeOptions(branch_passes=0)
