"""A folder keeps results of its evaluations, and its card has them as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.checkpoint.card import CARD
from rankbook.calibration.checkpoint.output import LISTING, RESULTS
from rankbook.calibration.checkpoint.results import keep_result
from rankbook.calibration.schema import SchemaError
from tests.calibration.checkpoint.writing import result_rows

TASKS: dict[str, Any] = {
    **{"model": ".", "kernels": "native", "flags": {}, "asked": {"tasks": ["one|two"], "limit": 5}},
    **{"on": "the first 5 documents", "runtime": "native", "command": "rankbook eval FOLDER --tasks one"},
    **{"date": "2026-01-02", "versions": {"rankbook": "0.1.0"}, "tasks": {"one|two": {"acc,none": 0.5, "alias": "x"}}},
}


def test_a_card_that_was_lost_and_names_that_would_break_a_table(tmp_path: Path) -> None:
    (tmp_path / LISTING).write_text('{"files": []}')
    keep_result(tmp_path, TASKS)
    assert result_rows(tmp_path) == [[r"one\|two, the first 5 documents", "acc", "0.5", "native"]]
    keep_result(tmp_path, {**TASKS, "tasks": {"one|two": {"acc,none": 0.75}}})
    assert [row[2] for row in result_rows(tmp_path)] == ["0.75"]
    assert json.loads((tmp_path / LISTING).read_text())["files"] == [CARD, RESULTS]


@pytest.mark.parametrize(
    "content", ["{", '{"format_version": 2, "results": []}', '{"format_version": 1, "results": 3}']
)
def test_damaged_results_are_a_sentence_and_stay(tmp_path: Path, content: str) -> None:
    (tmp_path / RESULTS).write_text(content)
    with pytest.raises(SchemaError, match="evaluate again with --card, or remove the file"):
        keep_result(tmp_path, TASKS)
    assert (tmp_path / RESULTS).read_text() == content
