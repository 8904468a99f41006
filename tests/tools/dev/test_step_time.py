"""Decode steps of several texts are timed for each file, number of texts and length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools import errors
from rankbook.tools.dev import step_time
from tests.exporter.checkpoints import make_checkpoint


def test_every_case_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", model={"head_dim": 16}, bits=4)
    folders = [tmp_path / kv for kv in ("float", "float16")]
    for folder in folders:
        export(checkpoint, folder, ExportOptions(graph="ort", kv=folder.name))
    sizes = ["--rows", "1", "3", "--positions", "4", "9", "--turns", "1", "--steps", "2"]
    assert step_time.main([*map(str, folders), "--kernels", "bodies", *sizes, "--json"]) == errors.OK
    rows = json.loads(capsys.readouterr().out)
    assert {(row["file"], row["rows"], row["positions"]) for row in rows} == {
        (folder.name, count, length) for folder in folders for count in (1, 3) for length in (4, 9)
    }
    for row in rows:
        alone = next(r for r in rows if (r["file"], r["positions"], r["rows"]) == (row["file"], row["positions"], 1))
        assert row["speed"] == pytest.approx(row["rows"] * alone["milliseconds"] / row["milliseconds"])
