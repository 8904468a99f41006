"""What a dry run says is what the run then stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import plan, quantize_model
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli, stdout_json

RULES = ("*.down_proj: bits=8 group=channel", "*.v_proj: branch=lqer:8", "*.layers.0.self_attn.k_proj: skip")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize("values", [
    {"method": "rtn", "bits": 4},
    {"method": "lcq", "bits": 3, "rank": 2, "effort": "fast"},
    {"method": "gptq", "bits": 4, "error_branch": "qera", "error_rank": 40},
], ids=lambda values: values["method"])  # fmt: skip
def test_a_plan_is_what_the_run_stores(values: dict, source: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(
        **values, rules=RULES, calib=str(source / "text.txt"), calib_sequences=4, calib_length=32
    )  # fmt: skip
    _, planned = plan(source / "model", options)
    report = quantize_model(source / "model", tmp_path / "q", options)
    assert {name: spec.to_json() for name, spec in planned.specs.items()} == {
        name: layer.spec.to_json() for name, layer in report.layers.items()
    }
    assert planned.memory["one block in float32"] < planned.memory["weights"]
    assert ("statistics of a block" in planned.memory) == options.weighs_inputs()


def test_the_command_line_shows_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [source / "model", "--method", "rtn", "--bits", 4, "--rule", RULES[0], "-o", tmp_path / "q", "--dry-run"]
    assert run_cli("quantize", *where, "--json", "--quiet") == 0
    found = stdout_json(capsys)
    assert found["specs"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert 4 < found["bits_per_weight"] < 9
    assert 0 < found["seconds"] < 60
    assert not (tmp_path / "q").exists()
    assert run_cli("quantize", *where, "--quiet") == 0
    shown = capsys.readouterr().out
    assert "48 x 80" in shown
    assert "an estimate from one block" in shown
