"""Every method and option of calibration through the command line, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.checkpoint.format import MANIFEST, load_records
from rankbook.calibration.methods import METHODS
from rankbook.tools import errors
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli, stdout_json
from tests.tools.method_runs import RUNS

RANKS: list[object] = ["--target-bits", 6, "--allocate", "bits", "rank", "--effort", "fast"]
BRANCHES: list[object] = ["--target-bits", 7, "--allocate", "bits", "branch", "--method", "rtn"]
BRANCHES += ["--error-branch", "qera", "--error-rank", 8]
"""Flags that give layers different bits, and different planes or ranks of the error branch."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a text."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    return folder


def quantize(work: Path, output: Path, *flags: object) -> int:
    """Run ``rankbook quantize`` with little calibration text."""
    calib = ["--calib", work / "text.txt", "--calib-sequences", 4, "--calib-length", 32]
    return int(run_cli("quantize", work / "model", *flags, *calib, "-o", output, "--quiet"))


@pytest.mark.parametrize("name", RUNS)
def test_every_method_writes_a_checkpoint(name, work, tmp_path):
    method = name.partition("-")[0]
    assert quantize(work, tmp_path / "q", "--method", method, "--bits", 4, *RUNS[name]) == 0
    records = load_records(tmp_path / "q")
    assert len(records) == 14
    assert {record.method for record in records.values()} == {"flexround" if name == "lrq-full" else method}
    scaled = json.loads((tmp_path / "q" / MANIFEST).read_text())["scaled_inputs"]
    assert len(scaled) == (12 if name in ("awq", "smoothquant", "lcq") else 0)


def test_every_method_is_run_here():
    assert {name.partition("-")[0] for name in RUNS} == set(METHODS)


@pytest.mark.parametrize(
    "flags", [["--method", "awq"], ["--method", "gptq", "--target-bits", 5.5], RANKS, BRANCHES], ids=str
)
def test_scaled_norms_and_mixed_widths_are_exported(flags, work, tmp_path, capsys):
    if "--target-bits" in flags:
        pytest.importorskip("scipy")
    assert quantize(work, tmp_path / "q", *flags, "--group-size", 16) == 0
    if flags in (RANKS, BRANCHES):
        manifest = json.loads((tmp_path / "q" / MANIFEST).read_text())
        assert flags[1] - 0.5 < manifest["totals"]["linear"]["bits_per_weight"] <= flags[1]
        records = load_records(tmp_path / "q").values()
        assert len({(record.planes, record.low_rank and record.low_rank.branch_rank) for record in records}) > 1
    elif "--target-bits" in flags:
        assert len({record.bits for record in load_records(tmp_path / "q").values()}) > 1
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / "onnx", "--logits", "all", "--quiet") == 0
    capsys.readouterr()
    found = []
    for name in ("q", "onnx"):
        common = ["--text", work / "text.txt", "--context", 64, "--max-tokens", 256, "--json", "--quiet"]
        assert run_cli("eval", tmp_path / name, *common) == 0
        found.append(stdout_json(capsys)["perplexity"])
    # The same weights in both: they differ by the rounding of float32 sums only.
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "quip"], "choose one of awq, flexround"),
        (["--scale-inputs", "quarot"], "choose one of none, awq, smoothquant"),
        (["--method", "gptq", "--target-bits", 1.5], "are too few"),
        (["--method", "lrq", "--weight-format", "nf4"], "choose one of affine, symmetric"),
    ],
)
def test_wrong_values_are_usage_errors(flags, message, work, tmp_path, capsys):
    assert quantize(work, tmp_path / "q", *flags) == errors.USAGE
    assert message in capsys.readouterr().err
