"""Folders and reports that belong together are one run; what belongs nowhere is named."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from rankbook.calibration.source import Kind
from rankbook.tools.errors import UsageError
from rankbook.tools.page.documents import Evaluation
from rankbook.tools.page.page import make_page
from rankbook.tools.page.runs import _letter, collect
from rankbook.tools.report import plain
from tests.tools.page.reports import LOST, SPEED


def test_a_folder_of_runs_is_sorted_into_them(made):
    """By the hashes of weights, and reports by the paths that they name; plain models are no runs."""
    found = collect([made / "three", made / "four", made / "onnx", made / "reports"])
    assert [(run.letter, [part.kind for part in run.parts]) for run in found.runs] == [
        ("A", [Kind.CHECKPOINT, Kind.ONNX]),
        ("B", [Kind.CHECKPOINT]),
    ]
    assert [sorted(report.path.name for report in run.reports) for run in found.runs] == [
        ["eval-three.json", "parity.json"],
        ["eval-four.json"],
    ]
    assert collect([made.folder]).runs[1].name == str(made / "onnx")  # of one run with `three`, which comes later
    assert [item.name for item in found.unused] == []


def test_reports_find_their_run_after_both_moved(made, tmp_path, monkeypatch):
    shutil.copytree(made / "four", tmp_path / "elsewhere" / "four")
    report = json.loads((made / "reports" / "eval-four.json").read_text())
    (tmp_path / "elsewhere" / "reports").mkdir()
    (tmp_path / "elsewhere" / "reports" / "e.json").write_text(json.dumps({**report, "model": "four"}))
    monkeypatch.chdir(made / "reports")
    (run,) = collect([tmp_path / "elsewhere"]).runs
    assert [type(item.content) for item in run.reports] == [Evaluation]


def test_a_report_without_its_folder_is_a_run_of_its_own(made, tmp_path):
    path = tmp_path / "lost.json"
    path.write_text(json.dumps(LOST))
    found = collect([made / "four", path])
    assert [(run.letter, run.name, bool(run.parts)) for run in found.runs] == [
        ("A", str(made / "four"), True),
        ("B", "gone", False),
    ]
    assert not found.runs[1].reports[0].earlier


def test_a_report_of_before_the_weights_is_marked(made, tmp_path):
    report = json.loads((made / "reports" / "eval-four.json").read_text())
    path = tmp_path / "old.json"
    path.write_text(json.dumps(report))
    os.utime(path, (1, 1))
    assert collect([made / "four", path]).runs[0].reports[0].earlier
    os.utime(path)
    assert not collect([made / "four", path]).runs[0].reports[0].earlier


def test_measurements_belong_to_all_and_name_their_runs(made, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"machine": {}, "models": [plain(SPEED)]}))
    found = collect([made / "four", tmp_path])
    assert [report.path for report in found.shared] == [path]
    assert found.run_of(str(made / "four"), path) is found.runs[0]
    assert found.run_of("nothing", path) is None


def test_json_of_others_is_listed_in_a_folder_and_refused_by_name(made, tmp_path):
    shutil.copytree(made / "four", tmp_path / "four")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    assert collect([tmp_path]).unused == [tmp_path / "package.json"]
    with pytest.raises(UsageError, match="no report of eval, parity, bench"):
        collect([tmp_path / "package.json"])


def test_what_is_nothing_says_what_could_be_given(tmp_path):
    with pytest.raises(UsageError, match=r"does not exist; give .*, or JSON of eval"):
        collect([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run and no report; give checkpoints"):
        collect([tmp_path / "empty"])
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UsageError, match=r"notes\.txt is a file, but not of a kind"):
        collect([tmp_path / "notes.txt"])


def test_letters_go_on_behind_z():
    assert [_letter(index) for index in (0, 25, 26, 51, 52, 701, 702)] == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


def test_a_path_that_may_mean_two_runs_says_so(made, tmp_path, monkeypatch):
    """Typed from another folder than the current one, or not: the report cannot tell."""
    for name, bits in (("near", "three"), ("far", "four")):
        (tmp_path / name).mkdir()
        shutil.copytree(made / bits, tmp_path / name / "q")
    path = tmp_path / "far" / "e.json"
    path.write_text(json.dumps({**LOST, "model": "q"}))
    monkeypatch.chdir(tmp_path / "near")
    page = make_page([tmp_path / "near" / "q", tmp_path / "far"], "t", 0)
    assert [len(run.reports) for run in page.collection.runs] == [1, 0]
    (said,) = [line for line in page.sections[0].missing if "may also mean" in line]
    assert said.endswith(f"the path in it may also mean {tmp_path / 'far' / 'q'}")
