"""What a run tells: progress with an estimate, sums over layers, and what stays in float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rankbook.calibration.driver.report import (
    OUTSIDE,
    SKIPPED,
    LayerReport,
    Progress,
    QuantizeReport,
    Reporter,
    in_float,
    output_error,
    output_errors,
    totals,
)
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from tests.calibration.records import random_record

LAYERS = {name: LayerReport(random_record(seed=index).spec(), 0.1) for index, name in enumerate("ab")}


def report(left_alone: dict[str, str]) -> QuantizeReport:
    floats = in_float([nn.Linear(8, 8)], LAYERS.values())
    return QuantizeReport(
        output_dir=Path("q"),
        layers=LAYERS,
        totals=totals(LAYERS, {"blocks": floats}),
        left_alone=left_alone,
        few_tokens=(),
        scaled=(),
        calibration="",
        calibration_windows={},
        seconds=1.0,
        resumed_at=0,
        peak_rss_bytes=1,
    )


def test_totals_are_sums_over_the_layers() -> None:
    found = totals(LAYERS, {"lm_head": {"name": "x"}})
    assert found["linear"]["weights"] == 2 * 40 * 48
    assert found["linear"]["stored_bits"] == sum(sum(layer.stored_bits.values()) for layer in LAYERS.values())
    assert found["linear"]["stored_bits"] == sum(found["linear"]["parts"].values())
    assert found["lm_head"] == {"name": "x"}


def test_the_share_in_float_counts_each_parameter_once_and_no_vectors() -> None:
    linear = nn.Linear(8, 4)
    found = in_float([linear, nn.Sequential(linear)], LAYERS.values())
    assert found["float_weights"] == 32
    assert found["float_share"] == 32 / (32 + 2 * 40 * 48)


def test_only_what_is_a_surprise_is_unknown() -> None:
    assert report({"a": SKIPPED, "b": f"Embedding {OUTSIDE}"}).unknown == ""
    assert "2 such as c (Conv1D is odd)" in report({"c": "Conv1D is odd", "d": "Conv1D is odd"}).unknown
    assert report({}).to_json()["layers"]["a"]["error"] == 0.1


def test_progress_has_an_estimate_once_work_was_done() -> None:
    seen: list[Progress] = []
    reporter = Reporter(4, seen.append)
    reporter.tell("text", -1)
    reporter.start(1)
    reporter.tell("block", 1, 0.5)
    assert [step.fraction for step in seen] == [0.0, 0.375]
    assert seen[0].eta_s is None
    assert seen[1].eta_s is not None
    assert seen[1].eta_s >= 0


def test_the_error_of_an_output_is_relative_to_it() -> None:
    record = random_record()
    statistics = LayerStatistics.empty(48)
    statistics.update(torch.randn(64, 48))
    problem = LayerProblem("layer", record.weight() * 1.1, None, statistics)
    assert output_error(problem, record) == pytest.approx((0.1 / 1.1) ** 2, rel=1e-3)
    assert output_error(replace(problem, statistics=LayerStatistics.unseen(48)), record) is None


def test_errors_are_also_those_without_the_branch() -> None:
    record = random_record(rank=2)
    statistics = LayerStatistics.empty(48)
    statistics.update(torch.randn(64, 48))
    problem = LayerProblem("layer", record.weight(with_low_rank=True) * 1.1, None, statistics)
    error, bare = output_errors(problem, record)
    assert error == output_error(problem, record) == pytest.approx((0.1 / 1.1) ** 2, rel=1e-3)
    assert bare == output_error(problem, replace(record, low_rank=None))
    assert bare is not None
    assert error is not None
    assert bare > error
    assert LayerReport(record.spec(), error, bare).to_json()["error_without_branch"] == bare
    plain = record.with_low_rank(None)
    assert output_errors(problem, plain) == (bare, None)
    assert "error_without_branch" not in LayerReport(plain.spec(), bare).to_json()
