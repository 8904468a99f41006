"""Divisors that steer rounding: training starts at the record, and a step moves what its gradient asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rankbook.calibration.fitting.grids import Grid, round_nearest, round_with_feedback
from rankbook.calibration.training.scaled_rounding import Divisors, ScaledRounding
from tests.calibration import problems


@pytest.mark.parametrize("scaling_rank", [0, 4])
@pytest.mark.parametrize("weight_format", ["affine", "symmetric"])
def test_training_starts_exactly_at_the_record(weight_format: str, scaling_rank: int) -> None:
    problem = problems.layer(40, 128)
    record = round_with_feedback(problem, Grid(3, 64, weight_format), "lrq")
    layer = ScaledRounding(problem.weight, record, Divisors(scaling_rank, scaling_rank > 0))
    torch.testing.assert_close(layer.weight(), record.weight(), rtol=0, atol=1e-6)
    assert torch.equal(layer.record().codes, record.codes)


def test_a_step_follows_the_gradient_and_the_record_is_what_was_decoded() -> None:
    problem = problems.layer(40, 128)
    record = round_nearest(problem, Grid(3, 64), "lrq")
    layer = ScaledRounding(problem.weight, record, Divisors(4, scale_rate=0.05, rate=0.05))
    target = problem.weight * 1.2
    before = float((layer.weight() - target).square().sum())
    for step in range(20):
        layer.update(layer.weight() - target, 1 - step / 20)
    assert float((layer.weight() - target).square().sum()) < 0.9 * before
    torch.testing.assert_close(layer.record().weight(), layer.weight(), rtol=0, atol=1e-6)
    assert layer.record().method == "lrq"


@pytest.mark.parametrize("param_bits", [8, 16])
def test_rows_and_groups_of_zeros_stay_zero_in_training(param_bits: int) -> None:
    problem = problems.layer(40, 128)
    weight = problem.weight.clone()
    weight[7], weight[9, :64] = 0, 0
    record = round_nearest(replace(problem, weight=weight), Grid(3, 64, param_bits=param_bits), "lrq")
    layer = ScaledRounding(weight, record, Divisors(4, scale_rate=0.05, rate=0.05))
    for step in range(5):
        layer.update(layer.weight() - 1.2 * weight, 1 - step / 5)
    trained = layer.record().weight()
    assert float(trained[7].abs().max()) < 1e-6
    assert float(trained[9, :64].abs().max()) < 1e-6
    assert float((trained - 1.2 * weight).square().sum()) < float((record.weight() - 1.2 * weight).square().sum())
