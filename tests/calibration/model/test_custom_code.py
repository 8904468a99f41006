"""Code of a model's folder: refused by name, run only where it is trusted, by every verb that loads the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.model.custom_code import code_refused, is_trusted, trusted_code
from rankbook.tools import errors
from tests.tiny import tiny_model
from tests.tools.files import run_cli

CONFIGURATION = "from transformers import LlamaConfig\n\n\nclass Config(LlamaConfig):\n    model_type = 'own_llama'\n"
MODELING = """from transformers import LlamaForCausalLM

from .own_configuration import Config


class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama whose classes are files of its folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_model("llama", folder, num_hidden_layers=1)
    (folder / "own_configuration.py").write_text(CONFIGURATION)
    (folder / "own_modeling.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "own_configuration.Config",
        "AutoModelForCausalLM": "own_modeling.Model",
    }
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own_llama"}))
    return folder


def test_trusted_code_runs_in_every_verb(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize = ["quantize", own, "--method", "rtn", "--bits", 4, "--group-size", 16, "-o", tmp_path / "q", "--quiet"]
    assert run_cli(*quantize) == errors.USAGE
    said = capsys.readouterr().err
    assert "(own_configuration.py, own_modeling.py)" in said
    assert "--trust-remote-code" in said
    assert run_cli(*quantize, "--trust-remote-code") == 0
    assert not is_trusted(), "not beyond the run"
    export = ["export", tmp_path / "q", "-o", tmp_path / "onnx", "--quiet"]
    assert run_cli(*export) == errors.USAGE
    assert run_cli(*export, "--trust-remote-code") == 0
    parity = ["parity", tmp_path / "onnx", "--tokens", 8, "--no-layers", "--quiet", "--trust-remote-code"]
    assert run_cli(*parity) == 0


def test_what_is_named(tmp_path: Path) -> None:
    """Files of another model of the hub too; a folder without any is refused all the same."""
    assert "its own folder, which" in code_refused(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a/b--own.Slow", null]}}')
    assert "(a/b--own.py)" in code_refused(str(tmp_path))
    with trusted_code(), trusted_code(False):
        assert not is_trusted()
