"""The verbs that read an exported file work on every dialect, or say why they do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rankbook.exporter.file import ExportedModel
from rankbook.exporter.stored import ExportedFileError
from rankbook.tools import errors
from rankbook.tools.runtimes import trt
from tests.tiny import tiny_model, write_text
from tests.tools.files import damage, run_cli, stdout_json

OTHERS = ("qdq", "ort")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a symmetric checkpoint ``q`` and its file in two dialects, ``qdq`` and ``ort``."""
    folder = tmp_path_factory.mktemp("dialects")
    tiny_model("llama", folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt")
    how = ["--method", "rtn", "--bits", 4, "--weight-format", "symmetric", "--error-branch", "lqer", "--error-rank", 2]
    calib = ["--calib", folder / "text.txt", "--calib-sequences", 2, "--calib-length", 16]
    assert run_cli("quantize", folder / "model", *how, *calib, "-o", folder / "q", "--quiet") == 0
    for name in OTHERS:
        flags = ["--dialect", name, "--logits", "all", "--quiet"]
        assert run_cli("export", folder / "q", "-o", folder / name, *flags) == 0
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_parity_compares_every_layer(name, work, tmp_path, capsys):
    assert run_cli("parity", work / name, "--tokens", 8, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["passed"]
    assert len(report["layers"]) == 7
    assert report["operators"] == []
    assert report["cached"]["error"] < 1e-5
    shutil.copytree(work / name, tmp_path / "onnx")
    bad = "model.layers.0.mlp.up_proj"
    damage(tmp_path / "onnx", f"{bad}.codes")
    common = ["--checkpoint", work / "q", "--tokens", 8, "--json", "--quiet"]
    assert run_cli("parity", tmp_path / "onnx", *common) == errors.CHECK_FAILED
    assert stdout_json(capsys)["first_bad_layer"] == bad


@pytest.mark.parametrize("name", OTHERS)
def test_eval_and_generate_run_and_inspect_tells_the_stored_form(name, work, capsys):
    text = ["--text", work / "text.txt", "--context", 16, "--max-tokens", 32, "--json", "--quiet"]
    results = []
    for model in ("q", name):
        assert run_cli("eval", work / model, *text) == 0
        results.append(stdout_json(capsys)["perplexity"])
    # The same weights, float32 sums in another order.
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert (
        run_cli("generate", work / name, "-p", "the", "--max-new-tokens", 3, "--ignore-eos", "--json", "--quiet") == 0
    )
    assert stdout_json(capsys)["tokens"] == 3
    assert run_cli("inspect", work / name, "--json") == 0
    layers = {layer["name"]: layer for layer in stdout_json(capsys)["layers"]}
    assert len(layers) == 7
    layer = layers["model.layers.0.self_attn.q_proj"]
    assert (layer["bits"], layer["error_rank"], layer["method"]) == (4, 2, "rtn")
    # 48 x 48 codes of 4 bits, a float32 scale for 48 or 16 weights, and the branch: 2 x 96 bytes and 4 scales.
    side = 32 / (48 if name == "qdq" else 16)
    assert layer["stored_bits"] == pytest.approx(4 + side + (2 * 96 * 8 + 4 * 32) / 48**2)


def test_tensorrt_is_not_given_operators_of_onnx_runtime(work, tmp_path, capsys):
    with pytest.raises(ExportedFileError, match=r"com\.microsoft.*--dialect rankbook or qdq"):
        ExportedModel.open(work / "ort").require_standard()
    if trt.rtx_unavailable() is None:
        assert run_cli("build", work / "ort", "-o", tmp_path / "engine", "--quiet") == errors.USAGE
        assert "com.microsoft" in capsys.readouterr().err


@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
def test_an_engine_of_standard_operators_keeps_4_bits(work, tmp_path, capsys):
    limits = ["--max-sequence", 8, "--max-context", 16, "--compute-capability", "SM86"]
    assert run_cli("build", work / "qdq", *limits, "-o", tmp_path / "engine", "--json", "--quiet") == 0
    report = stdout_json(capsys)
    checks = {check["name"]: check for check in report["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert "of the file's codes {'int4':" in checks["codes stayed packed"]["detail"]


def test_a_refusal_names_the_layer_and_what_to_do(work, tmp_path, capsys):
    how = ["--method", "rtn", "--bits", 4, "--calib", work / "text.txt", "--calib-sequences", 1, "--calib-length", 8]
    assert run_cli("quantize", work / "model", *how, "-o", tmp_path / "q", "--quiet") == 0
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / "o", "--dialect", "qdq", "--quiet") == errors.USAGE
    assert "--weight-format symmetric" in capsys.readouterr().err
