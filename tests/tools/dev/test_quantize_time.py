"""Stages of a small run: all of its time is counted once, and codes are compared."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from rankbook.tools.dev import quantize_time
from tests.tiny import tiny_model


def test_the_time_of_a_stage_is_without_that_of_another_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    clock = quantize_time.Clock()

    def work(seconds: float) -> None:
        now[0] += seconds

    inner = clock.timed(work, "error feedback")

    def both() -> None:
        work(1.0)
        inner(2.0)
        work(4.0)

    clock.timed(both, "closed form")()
    assert clock.seconds["closed form"] == 5.0
    assert clock.seconds["error feedback"] == 2.0


def test_differing_codes_are_counted() -> None:
    one, other = {"a": torch.zeros(3, 4), "b": torch.ones(4)}, {"a": torch.zeros(3, 4), "b": torch.zeros(4)}
    assert quantize_time.changed(one, other) == 0.25
    with pytest.raises(ValueError, match="b was not quantized in both"):
        quantize_time.changed(one, {"a": one["a"]})


def test_every_stage_of_a_small_run_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", tmp_path / "model", hidden_size=64)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    flags = ["--calib-sequences", "2", "--calib-length", "32", "--method-option", "steps=3"]
    given = [str(tmp_path / "model"), "--calib", str(tmp_path / "text.txt"), "--blocks", "1", "-o", str(tmp_path / "t")]
    assert quantize_time.main([*given, "--", *flags]) == 0
    (run,) = json.loads((tmp_path / "t" / "runs.json").read_text())
    assert run["changed"] == 0.0
    assert set(run["seconds"]) == {*quantize_time.STAGES, "rest"}
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert run["weights"] == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 80  # q and o, k and v, gate, up and down
    assert "| per million weights |" in capsys.readouterr().out
