"""``rankbook eval --card``: a folder keeps its results, its card shows them, and all that lists its files knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.checkpoint.card import CARD
from rankbook.calibration.checkpoint.files import describe_file
from rankbook.calibration.checkpoint.format import MANIFEST, open_checkpoint
from rankbook.calibration.checkpoint.output import LISTING, RESULTS, check_replaceable
from rankbook.calibration.checkpoint.results import read_results
from rankbook.calibration.source import ONNX_NAME
from rankbook.tools import errors
from rankbook.tools.page.page import make_page
from tests.calibration.checkpoint.writing import result_rows
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint beside its text ``text.txt`` and its source ``model``."""
    return make_checkpoint(tmp_path_factory.mktemp("kept"), "llama", bits=4)


def test_results_go_into_card_manifest_listing_export_and_page(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model = checkpoint.parent / "text.txt", checkpoint.parent / "model"
    given = ["eval", checkpoint, "--text", text, "--context", 16, "--reference", model, "--card"]
    before = (checkpoint / CARD).read_text("utf-8")
    for most in (32, 64, 32):
        assert run_cli(*given, "--max-tokens", most, "--json", "--quiet") == errors.OK
        report = stdout_json(capsys)
    kept = read_results(checkpoint)
    assert [result["tokens"] for result in kept] == [60, 30], "the repeated one replaces its earlier result"
    assert kept[1]["perplexity"] == report["perplexity"]
    assert (kept[1]["model"], kept[1]["text"], kept[1]["reference"]) == (".", "text.txt", "model")
    assert str(checkpoint.parent) not in (checkpoint / RESULTS).read_text()
    assert result_rows(checkpoint)[4:] == [
        ["text.txt, 2 x 16 tokens", measure, f"{report[name]:.5g}", "dense"]
        for name, measure in (
            ("perplexity", "perplexity"),
            ("reference_perplexity", "perplexity of the unquantized model"),
            ("kl", "KL divergence from the unquantized model, nats"),
            ("top1_agreement", "same most likely token as the unquantized model"),
        )
    ]
    card = (checkpoint / CARD).read_text("utf-8")
    assert "rankbook eval FOLDER --text text.txt --context 16 --max-tokens 32 --reference model  # " in card
    assert card.count("## Results") == 1
    assert all(line in card for line in before.splitlines())
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert {name: files[name] for name in (CARD, RESULTS)} == {
        name: describe_file(checkpoint / name) for name in (CARD, RESULTS)
    }
    assert RESULTS in json.loads((checkpoint / LISTING).read_text())["files"]
    open_checkpoint(checkpoint, verify=True)

    onnx = tmp_path / "onnx"
    assert run_cli("export", checkpoint, "-o", onnx, "--logits", "all", "--quiet") == errors.OK
    assert result_rows(onnx) == [[*row[:3], "dense, the checkpoint"] for row in result_rows(checkpoint)]
    assert run_cli("eval", onnx, "--text", text, "--context", 16, "--max-tokens", 32, "--card", "--quiet") == errors.OK
    assert len(result_rows(onnx)) == len(result_rows(checkpoint)) + 1
    check_replaceable(onnx, ONNX_NAME)
    page = make_page([checkpoint, onnx], "", 0).html()
    assert "no evaluation" not in page
    assert f"rankbook eval {checkpoint} --text text.txt --context 16" in page


def test_what_has_no_card_is_refused_before_it_runs(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = checkpoint.parent / "text.txt"
    for model, said in ((checkpoint.parent / "model", "--card is for what has a model card"), ("owner/model", "exist")):
        assert run_cli("eval", model, "--text", text, "--card") == errors.USAGE
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert run_cli("eval", tmp_path, "--text", text, "--card") == errors.USAGE
    assert "rankbook did not write it" in capsys.readouterr().err
