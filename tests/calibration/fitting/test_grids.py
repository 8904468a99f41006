"""Grids of fixed formats: what is stored decodes to what was rounded to, and a search never loses."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.fitting import grids
from rankbook.calibration.fitting.grids import Grid
from tests.calibration import problems

FORMATS = [("affine", 3), ("symmetric", 4), ("nf4", 4), ("mxint", 4), ("affine", 8)]


@pytest.mark.parametrize(("name", "bits"), FORMATS)
def test_every_weight_gets_its_nearest_level(name: str, bits: int) -> None:
    problem = problems.layer(40, 128)
    grid = Grid(bits, 64, name)
    record = grids.round_nearest(problem, grid, "rtn")
    _, levels, params = grids.fit(problem, grid)
    books = grids.codebooks_of(levels, params)  # (G, L, N)
    best = (problem.weight.T.reshape(2, 64, 1, 40) - books[:, None]).abs().amin(2)
    torch.testing.assert_close(
        (record.weight() - problem.weight).abs().T.reshape(2, 64, 40), best, rtol=1e-4, atol=1e-7
    )
    assert record.bits == bits


@pytest.mark.parametrize(("name", "bits"), FORMATS[:4])
def test_a_search_of_the_range_loses_no_more(name: str, bits: int) -> None:
    problem = problems.layer(40, 128, heavy=True)
    energy = problem.statistics.second_moment()
    lost = [
        float(
            (
                (grids.round_nearest(problem, Grid(bits, 64, name, found), "rtn").weight() - problem.weight) ** 2
                @ energy
            ).sum()
        )
        for found in (True, False)
    ]
    assert lost[0] <= lost[1] * 1.001


def test_zero_stays_near_zero() -> None:
    problem = problems.layer(40, 128)
    problem.weight[:, ::4] = 0
    decoded = grids.round_nearest(problem, Grid(4, 64), "rtn").weight()
    step = (problem.weight.amax() - problem.weight.amin()) / 15
    assert float(decoded[:, ::4].abs().max()) < 0.1 * float(step)


def test_the_search_takes_the_best_candidate_of_each_group() -> None:
    (found,) = grids.search(
        lambda choice: (torch.full((2, 2), choice),),
        lambda value: (value - torch.tensor([[1.0, 2.0], [3.0, 9.0]])) ** 2,
        [1.0, 2.0, 3.0],
    )
    assert found.tolist() == [[1.0, 2.0], [3.0, 3.0]]


def test_a_grid_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="nf4 has 4 bits; 3 were asked for"):
        Grid(3, 64, "nf4")
    with pytest.raises(ValueError, match="param_bits 4 is not supported"):
        Grid(3, 64, param_bits=4)
