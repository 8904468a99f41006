"""`inspect --sensitivity`: what rounding one layer does, from one backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankbook.calibration.driver.sensitivity import layer_sensitivities
from tests.exporter.checkpoints import make_checkpoint
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli, stdout_json


def test_layers_that_the_output_depends_on_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1)
    with torch.no_grad():  # nothing of the second block's MLP reaches the output, its attention does
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(tmp_path / "model")
    tiny_model("llama", tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("token*"):
        file.rename(tmp_path / "model" / file.name)
    text = write_text(tmp_path / "text.txt", 3000)
    where = ["inspect", tmp_path / "model", "--sensitivity", "--calib", text, "--quiet"]
    assert run_cli(*where, "--json") == 0
    layers = {layer["name"]: layer for layer in stdout_json(capsys)["layers"]}
    assert len(layers) == 14
    gains = [layer["gain_3_to_4"] for layer in layers.values()]
    assert gains == sorted(gains, reverse=True)
    dead, live = layers["model.layers.1.mlp.up_proj"], layers["model.layers.1.self_attn.o_proj"]
    assert dead["harm"]["3"] < 1e-3 * live["harm"]["3"]
    # Four times the error of squares for each bit less, about: 16 levels beside 8 beside 4.
    assert live["harm"]["2"] > 2 * live["harm"]["3"] > 4 * live["harm"]["4"] > 100 * live["harm"]["8"]
    assert live["weights"] == 64 * 64
    assert run_cli(*where) == 0
    assert "3 to 4 bits gains" in capsys.readouterr().out


def test_what_has_no_sensitivity_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"quantized already.*give the original model"):
        layer_sensitivities(checkpoint)
    assert run_cli("inspect", checkpoint, "--calib", "x.txt") == 2
    assert "--calib is the text of --sensitivity" in capsys.readouterr().err
