"""Presets: valid options, which flags and configuration files go before, and which the help tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.presets import PRESETS, with_preset
from rankbook.tools import errors
from tests.tiny import tiny_model
from tests.tools.files import run_cli


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_options_that_are_allowed(name: str) -> None:
    options = QuantizeOptions(**PRESETS[name].values)
    assert options.needs_text() == (name != "fast")
    assert options.trains() == (name == "best")


def test_what_is_given_goes_before_the_preset() -> None:
    assert with_preset("fast", {"bits": 3}) == {"method": "rtn", "bits": 3, "group_size": 32}
    with pytest.raises(ValueError, match="preset 'quick' is not supported; choose one of fast, balanced, best"):
        with_preset("quick", {})
    with pytest.raises(ValueError, match="preset 'fast' is method 'rtn'"):
        with_preset("fast", {"method": "lcq"})


def test_the_command_line_takes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama", tmp_path / "model", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    (tmp_path / "c.yaml").write_text("quantize:\n  preset: fast\n  bits: 8\n")
    assert (
        run_cli("quantize", tmp_path / "model", "--config", tmp_path / "c.yaml", "-o", tmp_path / "q", "--quiet") == 0
    )
    options = json.loads((tmp_path / "q/rankbook.json").read_text("utf-8"))["options"]
    assert (options["method"], options["bits"], options["group_size"]) == ("rtn", 8, 32)
    # The file of resolved options runs again as it is.
    assert run_cli("quantize", "--config", tmp_path / "q/rankbook-quantize.yaml", "--overwrite", "--quiet") == 0
    assert run_cli("quantize", tmp_path / "model", "--preset", "slow", "-o", tmp_path / "r") == errors.USAGE
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_cli("quantize", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(preset.text.split()) in shown for preset in PRESETS.values())
