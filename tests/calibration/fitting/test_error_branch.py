"""Error branches: the closed forms against full decompositions (notes on LQER, 3.10)."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rankbook.calibration.fitting import error_branch
from rankbook.calibration.fitting.error_branch import ERROR_BRANCHES, fit_error_branch
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import rtn
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from tests.calibration import problems

KINDS = [kind for kind in ERROR_BRANCHES if kind != "none"]


def _case(rows: int = 48, columns: int = 64) -> tuple[LayerProblem, QuantizedLinear, Tensor]:
    problem = problems.layer(rows, columns)
    record = rtn.quantize(problem, rtn.RtnConfig(bits=3, group_size=32))
    return problem, record, problem.weight - record.weight()


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_reproduces_the_weight(kind: str) -> None:
    problem, record, _ = _case()
    branch = fit_error_branch(problem, record, kind, 1000, 32)
    assert branch is not None
    assert branch.branch_rank == 48
    # float32 decompositions of a matrix of size 0.05: errors of a few hundred ulps.
    torch.testing.assert_close(record.weight() + branch.dense(), problem.weight, rtol=0, atol=2e-5)


def test_truncated_error_is_the_tail_of_the_singular_values() -> None:
    problem, record, error = _case()
    for kind in ("lqer", "l2qer", "qera-diag"):
        scale = error_branch.channel_scale(problem, kind)
        branch = fit_error_branch(problem, record, kind, 8, 32)
        assert branch is not None
        left = torch.linalg.norm((error - branch.dense()) * scale)
        tail = torch.linalg.svdvals(error * scale)[8:].square().sum().sqrt()
        torch.testing.assert_close(left, tail, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2qer", "qera-diag", "qera"])
def test_the_branch_does_not_depend_on_the_size_of_the_inputs(kind: str) -> None:
    problem, record, _ = _case()
    small = copy.deepcopy(problem.statistics)
    small.divide(torch.full((64,), 1e6))
    first, second = (
        fit_error_branch(replace(problem, statistics=each), record, kind, 8, 32) for each in (problem.statistics, small)
    )
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first.dense(), second.dense(), rtol=0, atol=1e-3 * float(first.dense().abs().max()))


def test_qera_equals_the_paper_with_a_symmetric_square_root() -> None:
    problem, record, error = _case()
    gram = problem.statistics.gram.double() / problem.statistics.tokens
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ torch.diag(values.clamp_min(1e-9).sqrt()) @ vectors.T
    left, size, right = torch.linalg.svd(error.double() @ root)
    paper = left[:, :8] @ torch.diag(size[:8]) @ right[:8] @ torch.linalg.inv(root)
    branch = fit_error_branch(problem, record, "qera", 8, 32)
    assert branch is not None
    # The project's Gram matrix carries a damping of 1e-4 of its mean.
    torch.testing.assert_close(branch.dense(), paper.float(), rtol=0, atol=2e-3 * float(paper.abs().max()))


def test_with_a_constant_scale_l2qer_is_lqer() -> None:
    problem, record, _ = _case()
    statistics = LayerStatistics(torch.eye(64) * 4, torch.ones(64), torch.full((64,), 2.0), torch.full((64,), 3.0), 1)
    even = LayerProblem(problem.name, problem.weight, None, statistics)
    plain = fit_error_branch(even, record, "lqer", 8, 32)
    for kind in ("l2qer", "qera-diag", "qera"):
        other = fit_error_branch(even, record, kind, 8, 32)
        assert plain is not None
        assert other is not None
        torch.testing.assert_close(other.dense(), plain.dense(), rtol=0, atol=1e-5)


def test_activation_aware_branches_lose_less_of_the_output() -> None:
    problem, record, _ = _case(96, 128)
    lost = {}
    for kind in KINDS:
        branch = fit_error_branch(problem, record, kind, 16)
        lost[kind] = problems.output_error(problem, record.with_low_rank(branch).weight(with_low_rank=True))
    assert lost["qera"] < lost["qera-diag"] < lost["lqer"] < problems.output_error(problem, record.weight())
    assert lost["l2qer"] < lost["lqer"]


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bit_factors_cost_little(kind: str) -> None:
    problem, record, _ = _case()
    full, small = fit_error_branch(problem, record, kind, 16, 16), fit_error_branch(problem, record, kind, 16, 8)
    assert full is not None
    assert small is not None
    kept = [problems.output_error(problem, record.weight() + b.dense()) for b in (full, small)]
    # One part in 127 of each factor's peak; up is solved again for the stored down.
    assert kept[1] < 1.02 * kept[0]
    assert record.with_low_rank(small).bits_per_weight() < record.with_low_rank(full).bits_per_weight() - 4


def test_random_projections_agree_with_the_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(200, 12) @ torch.randn(12, 160) + 0.01 * torch.randn(200, 160)
    up, down = error_branch.truncated_svd(matrix, 12)
    monkeypatch.setattr(error_branch, "_EXACT_SIZE", 100)
    other_up, other_down = error_branch.truncated_svd(matrix, 12)
    torch.testing.assert_close(other_up @ other_down, up @ down, rtol=0, atol=1e-3)


def test_no_branch_and_wrong_values() -> None:
    problem, record, _ = _case()
    assert fit_error_branch(problem, record, "none", 8) is None
    assert fit_error_branch(problem, record, "qera", 0) is None
    with pytest.raises(ValueError, match="choose one of none, lqer"):
        fit_error_branch(problem, record, "svd", 8)
    with pytest.raises(ValueError, match="negative"):
        fit_error_branch(problem, record, "qera", -1)


def test_without_calibration_qera_is_lqer() -> None:
    problem, record, _ = _case()
    blind = LayerProblem(problem.name, problem.weight, None, LayerStatistics.empty(64))
    first, second = fit_error_branch(blind, record, "qera", 4, 32), fit_error_branch(blind, record, "lqer", 4, 32)
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first.dense(), second.dense(), rtol=0, atol=1e-5)
