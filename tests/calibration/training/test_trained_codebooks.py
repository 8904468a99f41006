"""Training of codebooks by gradient: values and gradients are those of the definition."""

from __future__ import annotations

from dataclasses import replace

import torch

from rankbook.calibration.fitting import codebook_fit, rounding
from rankbook.calibration.fitting.error_branch import fit_error_branch
from rankbook.calibration.fitting.grids import Grid, round_nearest
from rankbook.calibration.training import trained_codebooks
from rankbook.calibration.training.learned_rounding import LearnedRounding
from rankbook.calibration.training.reconstruct import TrainableLayer
from rankbook.calibration.training.scaled_rounding import Divisors, ScaledRounding
from rankbook.calibration.training.trained_codebooks import TrainedCodebooks
from tests.calibration import problems


def test_gradient_by_assignment_is_that_of_a_gather() -> None:
    grouped, codebooks = torch.randn(2, 16, 3), torch.randn(2, 8, 3, requires_grad=True)
    flow = torch.randn(2, 16, 3)
    trained_codebooks.decode(grouped, codebooks, "assignment").backward(flow)
    codes = rounding.nearest(grouped, codebooks.detach()).long()
    wanted = torch.zeros_like(codebooks).scatter_add_(1, codes, flow)
    torch.testing.assert_close(codebooks.grad, wanted)


def test_straight_through_gradient_is_lsq_for_uniform_levels() -> None:
    weight = torch.randn(1, 64, 1, dtype=torch.float64)
    step = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    shift = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    levels = torch.arange(8, dtype=torch.float64)
    flow = torch.randn(1, 64, 1, dtype=torch.float64)
    codebooks = (step * levels - shift)[None, :, None]
    decoded = trained_codebooks.decode(weight, codebooks, "straight-through")
    assert torch.equal(decoded, rounding.lookup(codebooks.detach(), rounding.nearest(weight, codebooks.detach())))
    decoded.backward(flow)
    place = (weight + 0.9) / 0.25
    inside = (place > 0) & (place < 7)
    codes = place.round().clamp(0, 7)
    assert step.grad is not None
    assert shift.grad is not None
    # LSQ (Esser et al. 2020): code minus place inside, code outside; the offset moves clipped weights only.
    torch.testing.assert_close(step.grad, (flow * torch.where(inside, codes - place, codes)).sum())
    torch.testing.assert_close(shift.grad, -(flow * ~inside).sum())


def test_the_parameterization_starts_at_the_given_codebooks() -> None:
    grouped, energy = problems.grouped()
    books = codebook_fit.fit(grouped, energy, 2, 8, 6)
    found = trained_codebooks.ClippedCodebooks(grouped, books).books()
    # Levels of plane 0 that fall (there are none) or a range beyond the weights would be cut; the rest is exact.
    torch.testing.assert_close(found.dense(), books.dense(), rtol=0, atol=0.02 * float(books.dense().abs().max()))


def test_what_is_trained_around_a_branch_starts_at_what_the_branch_leaves() -> None:
    problem, grid = problems.layer(40, 128), Grid(2, 64)
    branch = fit_error_branch(problem, round_nearest(problem, grid, "x"), "qera", 16)
    assert branch is not None
    rest = replace(problem, weight=problem.weight - branch.dense())
    record = round_nearest(rest, grid, "x").with_low_rank(branch)
    lost = problems.output_error(problem, record.weight(with_low_rank=True))
    scaled = ScaledRounding(problem.weight, record, Divisors(0, columns=False))
    trained = TrainedCodebooks(problem.weight, record, "straight-through", 0.01)
    layers: list[TrainableLayer] = [LearnedRounding(problem.weight, record, 10), scaled, trained]
    for layer in layers:
        # Codes of the whole weight would count what the branch adds twice: 1.9 times the error here.
        assert problems.output_error(problem, layer.weight()) < 1.02 * lost, type(layer).__name__
    assert torch.equal(scaled._place, rounding.to_groups(rest.weight, 64))  # nothing had to be anchored
