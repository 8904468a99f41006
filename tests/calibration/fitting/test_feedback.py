"""Error feedback: what one column loses the others make up for, in any order, and damaged statistics are said."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.fitting import feedback, rounding
from rankbook.calibration.fitting.problem import LayerProblem
from tests.calibration import problems


def codebooks(problem: LayerProblem) -> torch.Tensor:
    grouped = rounding.to_groups(problem.weight, 64)
    low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)
    return low + (high - low) * torch.linspace(0, 1, 8)[None, :, None]


@pytest.mark.parametrize("by_energy", [True, False])
def test_feedback_loses_less_of_the_output_than_nearest_levels(by_energy: bool) -> None:
    problem = problems.layer(40, 128)
    books, grouped = codebooks(problem), rounding.to_groups(problem.weight, 64)
    plan = feedback.plan(feedback.scaled_gram(problem, 0.01), 0.0, by_energy=by_energy)
    lost = [
        problems.output_error(problem, rounding.from_groups(rounding.lookup(books, codes)))
        for codes in (feedback.assign(grouped, books, plan), rounding.nearest(grouped, books))
    ]
    assert lost[0] < 0.7 * lost[1]


def test_the_factor_is_that_of_the_inverse() -> None:
    gram = problems.layer(4, 16).statistics.gram
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    factor = feedback.inverse_factor(gram, order, 0.01).double()
    damped = feedback.damped_gram(gram, 0.01)[order][:, order].double()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(16).double(), rtol=0, atol=1e-3)


def test_inputs_that_never_were_active_get_the_mean_energy() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0]))
    assert torch.equal(feedback.damped_gram(gram, 0.0), torch.diag(torch.tensor([2.0, 1.0])))


def test_damaged_weights_and_statistics_are_named() -> None:
    problem = problems.layer(4, 16)
    problem.statistics.gram[0, 0] = torch.inf
    with pytest.raises(ValueError, match="input statistics of layer hold NaN or infinity"):
        feedback.scaled_gram(problem, 0.01)
    problem = problems.layer(4, 16)
    problem.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weights of layer hold NaN or infinity"):
        feedback.scaled_gram(problem, 0.01)
