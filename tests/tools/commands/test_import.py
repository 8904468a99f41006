"""`rankbook import`: from another tool's checkpoint to an ONNX file that computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rankbook.tools import errors
from tests.tools.files import run_cli, stdout_json

FIXTURES = Path(__file__).parents[2] / "calibration/imports/fixtures"


@pytest.mark.parametrize("form", ["pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_an_imported_checkpoint_is_exported_and_computes_the_same(form, tmp_path, capsys):
    import onnxruntime

    source = FIXTURES / f"compressed-{form.partition('-')[0].replace('pack', 'w4')}"
    assert run_cli("import", source, "-o", tmp_path / "q", "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["format"] == "compressed-tensors"
    assert len(report["layers"]) == 7
    assert (
        run_cli("export", tmp_path / "q", "-o", tmp_path / "onnx", "--logits", "all", "--dtype", "fp32", "--quiet") == 0
    )
    wanted = json.loads((source / "expected.json").read_text("utf-8"))
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    ids = np.array(wanted["ids"])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    feed = {}
    for item in session.get_inputs():
        shape = [size if isinstance(size, int) else {"batch": 1}.get(size, 0) for size in item.shape]
        feed[item.name] = given[item.name] if item.name in given else np.zeros(shape, np.float32)
    logits = session.run(["logits"], feed)[0][0, -1:]
    # The reference computed in bfloat16.
    assert np.abs(logits - wanted["logits"]).max() < 0.02 * np.abs(wanted["logits"]).max()
    capsys.readouterr()
    assert run_cli("inspect", tmp_path / "q", "--json") == 0
    assert stdout_json(capsys)["facts"]["imported"]["settings"]["format"] == form


def test_a_checkpoint_is_not_replaced_unasked(tmp_path, capsys):
    assert run_cli("import", FIXTURES / "awq", "-o", tmp_path / "q", "--quiet") == 0
    assert run_cli("import", FIXTURES / "awq", "-o", tmp_path / "q", "--quiet") == errors.USAGE
    assert "--overwrite" in capsys.readouterr().err
    assert run_cli("import", FIXTURES / "awq", "-o", tmp_path / "q", "--overwrite", "--quiet") == 0
    assert run_cli("import", tmp_path / "q", "-o", tmp_path / "again", "--quiet") == errors.USAGE
    assert "is a checkpoint of rankbook already" in capsys.readouterr().err


def test_quantize_sends_to_import(tmp_path, capsys):
    assert run_cli("quantize", FIXTURES / "gptq", "--method", "rtn", "-o", tmp_path / "q") == errors.USAGE
    assert "`rankbook import" in capsys.readouterr().err
