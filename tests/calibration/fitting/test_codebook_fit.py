"""Codebooks of low rank: the alternation fits them, and full rank is Lloyd's algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankbook.calibration.fitting import codebook_fit, rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks
from tests.calibration import problems


def _error(grouped: Tensor, energy: Tensor, books: Codebooks) -> float:
    codebooks = books.dense()
    lost = rounding.lookup(codebooks, rounding.nearest(grouped, codebooks)) - grouped
    return float((lost.square() * energy[..., None]).sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_full_rank_is_lloyd_for_the_same_codes(bits: int) -> None:
    grouped, energy = problems.grouped()
    count = 1 << bits
    codes = rounding.nearest(grouped, codebook_fit.clipped_grid(grouped, energy, count).dense())
    moments = codebook_fit.moments_of(grouped, energy, codes, count)
    levels = torch.linalg.qr(torch.cat([torch.ones(count, 1), torch.randn(count, count - 1)], 1))[0].T[1:]
    codebooks = codebook_fit.solve_params(moments, levels).dense()
    used = moments.mass > 0
    # The ridge of 1e-6 is what separates the two.
    torch.testing.assert_close(codebooks[used], (moments.value / moments.mass)[used], rtol=1e-2, atol=1e-3)


def test_every_alternation_lowers_the_error_and_rank_helps() -> None:
    grouped, energy = problems.grouped()
    errors = [_error(grouped, energy, codebook_fit.fit(grouped, energy, rank, 8, 10)) for rank in (1, 2, 3, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.97 * errors[0]
    assert errors[0] < 0.9 * _error(grouped, energy, codebook_fit.clipped_grid(grouped, energy, 8))
