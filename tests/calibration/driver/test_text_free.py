"""Choices that no input can change: no text is read or sampled, no block runs, the result is the same as with text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.checkpoint.format import MANIFEST, load_records
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.notes import Note
from tests.calibration.runs import options
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "rtn", "quantize_lm_head": 8, "quantize_embeddings": 8},
        {"method": "rtn", "weight_format": "nf4", "error_branch": "lqer", "error_rank": 2},
        {"method": "lqer", "error_branch": "lqer", "error_rank": 2, "branch_passes": 2},
        {"method": "awq", "clip_search": False, "scale_inputs": "none"},
        {"method": "smoothquant", "scale_inputs": "none", "bits": 8, "kv_bits": 8, "activations": "token8"},
    ],
    ids=lambda changes: changes["method"] + ("+" if "error_branch" in changes else ""),
)
def test_text_would_change_nothing(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", tmp_path / "model")
    chosen = options(tmp_path, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(QuantizeOptions, "weighs_inputs", lambda _: True)
        wanted = quantize_model(tmp_path / "model", tmp_path / "text", chosen)
    assert wanted.calibration_windows["windows"] == 4
    for name in ("driver.run.calibration_batches", "model.capture.record_calls", "model.capture.collect"):
        monkeypatch.setattr(f"rankbook.calibration.{name}", None)  # would fail if it were called
    with pytest.warns(Note, match="text.txt is not read: nothing that was chosen depends on it"):
        report = quantize_model(tmp_path / "model", tmp_path / "none", chosen)
    found, want = (load_records(tmp_path / name) for name in ("none", "text"))
    assert found.keys() == want.keys() != set()
    for name, record in found.items():
        assert {key: value.tolist() for key, value in record.pack().items()} == {
            key: value.tolist() for key, value in want[name].pack().items()
        }
    assert (report.calibration_windows["windows"], report.calibration[:6]) == (0, "none: ")
    assert json.loads((tmp_path / "none" / MANIFEST).read_text())["calibration"] == report.calibration
    assert {layer.error for layer in report.layers.values()} == {None}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lcq"},
        {"method": "gptq"},
        {"method": "awq"},
        {"method": "smoothquant", "bits": 8},
        {"method": "lqer"},
        {"method": "rtn", "clip_search": True},
        {"method": "rtn", "scale_inputs": "awq"},
        {"method": "rtn", "error_branch": "qera"},
        {"method": "rtn", "error_branch": "lqer", "branch_passes": 2},
        {"method": "rtn", "target_bits": 4.2},
        {"method": "rtn", "activations": "static8"},
        {"method": "omniquant", "clip_search": False},
    ],
    ids=str,
)
def test_what_depends_on_inputs_asks_for_text(changes: dict[str, Any]) -> None:
    assert QuantizeOptions(**{"bits": 4, **changes}).needs_text()


def test_an_output_layer_that_is_fitted_asks_for_text(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, method="rtn", quantize_lm_head=4))
    assert report.calibration_windows["windows"] == 4
