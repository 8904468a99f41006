"""Codebooks as they are stored: rounding of levels and parameters, and the refit between."""

from __future__ import annotations

import pytest
import torch

from rankbook.calibration.fitting import codebook_fit, codebook_store, feedback, rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks
from rankbook.calibration.record.quantized_linear import GroupParams
from tests.calibration import problems


def test_the_gauge_keeps_the_tables() -> None:
    books = Codebooks(torch.randn(3, 8), torch.randn(3, 2, 5) + 2, torch.randn(2, 5))
    fixed = codebook_fit.canonical(books)
    torch.testing.assert_close(fixed.dense(), books.dense(), rtol=1e-4, atol=1e-5)
    frame = torch.cat([torch.ones(1, 8) / 8**0.5, fixed.levels])
    torch.testing.assert_close(frame @ frame.T, torch.eye(4), rtol=0, atol=1e-5)


def test_refitting_on_the_gram_matrix_lowers_the_output_error() -> None:
    problem = problems.layer(24, 128)
    gram, grouped = feedback.scaled_gram(problem, 0.01), rounding.to_groups(problem.weight, 64)
    books = codebook_fit.fit(grouped, gram.diagonal().view(-1, 64).contiguous(), 2, 8, 4)
    codes = rounding.nearest(grouped, books.dense())

    def output_error(now: Codebooks) -> float:
        return problems.output_error(problem, rounding.from_groups(rounding.lookup(now.dense(), codes)))

    refit = codebook_store.refit_params(grouped, codes, books, gram)
    assert output_error(refit) < 0.99 * output_error(books)
    # Against brute force: all parameters of one row by one least-squares problem, reached by repeated sweeps.
    for _ in range(60):
        refit = codebook_store.refit_params(grouped, codes, refit, gram)
    root = torch.linalg.cholesky(gram.double())
    columns = []
    for group in range(2):
        part = codes[group, :, 0].long()
        for values in (books.levels[0][part], books.levels[1][part], torch.ones(64)):
            column = torch.zeros(128)
            column[64 * group : 64 * group + 64] = values
            columns.append(column)
    design = root.T @ torch.stack(columns, 1).double()
    solved = torch.linalg.lstsq(design, (root.T @ problem.weight[0].double())[:, None]).solution[:, 0]
    found = torch.cat([torch.cat([refit.coeffs[:, g, 0], refit.offset[g, :1]]) for g in range(2)])
    torch.testing.assert_close(found, solved.float(), rtol=2e-2, atol=2e-3)


def test_parameters_beyond_float16_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        GroupParams.quantize(torch.tensor([[[float("inf")]]]), 8)
