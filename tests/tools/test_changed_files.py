"""A model saved again by transformers is exported; weights changed since they were written are named by every verb."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoModelForCausalLM

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.exporter.export import DATA, MODEL, export
from rankbook.tools import errors
from tests.tiny import tiny_model
from tests.tools.files import run_cli, stdout_json

AUTO: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same saved again by transformers, and an export of that."""
    folder = tmp_path_factory.mktemp("changed")
    tiny_model("llama", folder / "model")
    options = QuantizeOptions(method="rtn", bits=4, calib_sequences=2, calib_length=8)
    quantize_model(folder / "model", folder / "out", options)
    AUTO.from_pretrained(folder / "out").save_pretrained(folder / "again")
    export(folder / "again", folder / "onnx")
    return folder


def test_what_was_saved_again_is_inspected_with_a_note(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", folders / "again", "--json") == 0
    report = stdout_json(capsys)
    assert report["kind"] == "checkpoint"
    assert "saved again without rankbook.json" in report["facts"]["note"]
    assert len(report["layers"]) == 14
    assert run_cli("inspect", folders / "again") == 0
    assert "NOTE: saved again without rankbook.json" in capsys.readouterr().out


def test_a_swapped_data_file_is_named(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders / "onnx" / DATA
    original = data.read_bytes()
    assert run_cli("inspect", folders / "onnx", "--json") == 0
    capsys.readouterr()
    data.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        for verb in (("inspect",), ("inspect", "--verify"), ("parity", "--checkpoint", folders / "out")):
            assert run_cli(verb[0], folders / "onnx", *verb[1:]) == errors.USAGE
            told = capsys.readouterr().err
            assert f"{data} is not the file that {MODEL} was written with" in told
        assert run_cli("inspect", folders / "onnx", "--no-verify") == 0
    finally:
        data.write_bytes(original)


def test_changed_weights_of_a_checkpoint_are_named(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folders / "out" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        for verb in (
            ("inspect", folders / "out"),
            ("export", folders / "out", "-o", folders / "new"),
            ("parity", folders / "onnx", "--checkpoint", folders / "out"),
        ):
            assert run_cli(*verb) == errors.USAGE
            assert "model.safetensors has changed since it was written (SHA-256 differs)" in capsys.readouterr().err
        assert run_cli("inspect", folders / "out", "--no-verify") == 0
    finally:
        weights.write_bytes(original)


@pytest.mark.parametrize(
    ("part", "value", "said"), [("step", np.nan, "step holds NaN"), ("base", np.inf, "base holds NaN or infinity")]
)
def test_numbers_in_the_graph_are_checked(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, value: float, said: str
) -> None:
    shutil.copytree(folders / "onnx", tmp_path / "onnx")
    graph = onnx.load(str(tmp_path / "onnx" / MODEL), load_external_data=False)
    name = f"model.layers.0.mlp.up_proj.{part}"  # too small for the data file, so that its hash says nothing of it
    (tensor,) = [item for item in graph.graph.initializer if item.name == name]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(graph, str(tmp_path / "onnx" / MODEL))
    for verb in (("inspect",), ("parity", "--checkpoint", folders / "out")):
        assert run_cli(verb[0], tmp_path / "onnx", *verb[1:]) == errors.USAGE
        assert f"up_proj.{said}" in capsys.readouterr().err
