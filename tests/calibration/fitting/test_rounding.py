"""Groups, nearest levels and codes with error feedback, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankbook.calibration.fitting import feedback, rounding
from tests.calibration import problems


def test_groups_undo() -> None:
    weight = torch.randn(5, 96)
    grouped = rounding.to_groups(weight, 32)
    assert grouped.shape == (3, 32, 5)
    assert torch.equal(grouped[1, 4], weight[:, 36])
    assert torch.equal(rounding.from_groups(grouped), weight)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8, 16, 256]), st.integers(0, 10_000), st.booleans())
def test_nearest_is_the_brute_force_nearest(levels: int, seed: int, in_order: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    codebooks = torch.randn(2, levels, 3, generator=generator)
    if in_order:
        codebooks = codebooks.sort(dim=1).values
    values = torch.randn(2, 16, 3, generator=generator) * 2
    found = rounding.lookup(codebooks, rounding.nearest(values, codebooks))
    best = (values[:, :, None] - codebooks[:, None]).abs().amin(2)
    # The midpoint may be rounded by one ulp, so distances agree to that and not exactly.
    torch.testing.assert_close((values - found).abs(), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("groups", "levels"), [(3, 8), (40, 4), (2, 32)])
def test_searches_count_the_boundaries_below(groups: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    values = torch.randn(groups, 16, 300, generator=generator)
    bounds = torch.randn(groups, levels - 1, 300, generator=generator).sort(1).values
    values[:, 0] = bounds[:, 0]  # a value on a boundary belongs to the lower cell
    want = (values[:, :, None] > bounds[:, None]).sum(2)
    assert torch.equal(rounding.search(values, bounds).long(), want)
    assert torch.equal(rounding.search_column(values[0, 3], bounds[0]).long(), want[0, 3])


def test_a_tie_goes_to_the_smaller_level() -> None:
    codebooks = torch.tensor([0.0, 1.0, 2.0, 3.0])[None, :, None]
    assert rounding.nearest(torch.tensor([[[0.5], [2.5]]]), codebooks).flatten().tolist() == [0, 2]


def test_feedback_with_uncorrelated_inputs_is_the_nearest_level() -> None:
    grouped = torch.randn(2, 32, 7)
    codebooks = torch.randn(2, 8, 7)
    assert torch.equal(
        feedback.assign(grouped, codebooks, feedback.plan(torch.eye(64))), rounding.nearest(grouped, codebooks)
    )


def test_feedback_matches_a_plain_column_loop_and_beats_the_nearest_level() -> None:
    problem = problems.layer(rows=6, columns=192)
    gram = feedback.damped_gram(problem.statistics.gram)
    grouped = rounding.to_groups(problem.weight, 64)
    codebooks = torch.linspace(-0.12, 0.12, 8)[None, :, None].expand(3, 8, 6).contiguous()
    codes = feedback.assign(grouped, codebooks, feedback.plan(gram, 0.0))
    decoded = rounding.from_groups(rounding.lookup(codebooks, codes))
    # Plain GPTQ, one column at a time with the inverse of the remaining Gram matrix.
    order = gram.diagonal().argsort(descending=True).tolist()
    work, plain = problem.weight.clone().double(), torch.zeros_like(problem.weight)
    for at, column in enumerate(order):
        inverse = torch.linalg.inv(gram.double()[order[at:]][:, order[at:]])
        codebook = codebooks[column // 64, :, 0]
        plain[:, column] = codebook[(work[:, column, None] - codebook).abs().argmin(1)]
        error = (work[:, column] - plain[:, column]) / inverse[0, 0]
        work[:, order[at:]] -= error[:, None] * inverse[0]
    # float32 and float64 may part ways at a boundary, after which later columns differ: compare errors, not codes.
    assert problems.output_error(problem, decoded) == pytest.approx(problems.output_error(problem, plain), rel=0.05)
    nearest = rounding.from_groups(rounding.lookup(codebooks, rounding.nearest(grouped, codebooks)))
    assert problems.output_error(problem, decoded) < 0.8 * problems.output_error(problem, nearest)


def test_inputs_that_never_were_active_are_simply_rounded() -> None:
    gram = torch.zeros(64, 64)
    gram[:32, :32] = torch.eye(32)
    grouped, codebooks = torch.randn(1, 64, 3), torch.randn(1, 8, 3)
    assert torch.equal(feedback.assign(grouped, codebooks, feedback.plan(gram)), rounding.nearest(grouped, codebooks))


def test_a_damaged_gram_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        feedback.plan(torch.full((16, 16), float("nan")))
