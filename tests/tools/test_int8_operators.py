"""``export --activations int8``: operators that round their input, from the checkpoint to every command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from rankbook.plugins import contract, library
from rankbook.tools import errors
from rankbook.tools.evaluate import node_checks
from rankbook.tools.evaluate.tolerance import match_settings
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12))
KERNELS = ["bodies", "native"] if library.unavailable("ort") is None else ["bodies"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``q`` of 4 bits, two planes and an error branch, and its files ``int8``, ``float``."""
    folder = tmp_path_factory.mktemp("integer")
    options = {"bits": 4, "group_size": 16, "error_branch": "lqer", "error_rank": 4}
    (folder / "q").symlink_to(make_checkpoint(folder, "llama", model={"num_hidden_layers": 1}, **options))
    for name in ("int8", "float"):
        flags = ["--activations", name, "--logits", "all", "--quiet"]
        assert run_cli("export", folder / "q", "-o", folder / name, *flags) == 0
    return folder


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_every_product_rounds_and_no_look_up_does(work: Path) -> None:
    model = onnx.load(work / "int8" / "model.onnx", load_external_data=False)
    kinds = {node.op_type for node in model.graph.node if node.domain == contract.DOMAIN}
    assert all(
        contract.PACKED[kind].int8_activations or contract.PACKED[kind].kind == contract.GATHER for kind in kinds
    )
    assert kinds & {contract.op_name(contract.MATMUL_LOW_RANK_INT8, 4)}
    plain = onnx.load(work / "float" / "model.onnx", load_external_data=False)
    assert len(plain.graph.node) == len(model.graph.node)
    sizes = [(work / name / "model.onnx.data").stat().st_size for name in ("int8", "float")]
    assert sizes[0] == sizes[1]


def test_a_session_needs_no_option(work: Path) -> None:
    """Bodies and library agree; the library's own int8 mode on the other file gives the same to the last bit."""
    scores = {kernels: OrtModel(work / "int8", kernels=kernels).logits(TOKENS) for kernels in KERNELS}
    exact = OrtModel(work / "float", kernels="bodies").logits(TOKENS)
    assert relative(scores["bodies"], exact) > 1e-4, "nothing was rounded"
    if "native" in scores:
        # float32 in another order, until a number falls to the other side of a rounding: then one step of 1/127.
        assert relative(scores["native"], scores["bodies"]) < 2e-2
        mode = OrtModel(work / "float", kernels="native-int8").logits(TOKENS)
        np.testing.assert_array_equal(scores["native"], mode)


@pytest.mark.parametrize("kernels", KERNELS)
def test_parity_compares_with_the_same_rounding(work: Path, kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The torch model rounds too: what is left is far below what the rounding itself does to the logits."""
    assert run_cli("parity", work / "int8", "--kernels", kernels, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["passed"]
    exact = TorchModel(work / "q").logits(TOKENS)
    rounded = relative(OrtModel(work / "int8", kernels=kernels).logits(TOKENS), exact)
    assert report["logits"]["error"] < 0.5 * rounded
    assert max(check["error"] for check in report["operators"]) < 2e-6


def test_a_layer_whose_input_drifted_is_judged_on_the_input_of_its_torch_module(work: Path) -> None:
    model, torch_model = OrtModel(work / "int8", kernels="bodies"), TorchModel(work / "q")
    match_settings(model.file, torch_model)
    captured = node_checks.capture_layers(torch_model, TOKENS)
    name = "model.layers.0.mlp.down_proj"
    drifted = node_checks.LayerCheck(name, 0.5, passed=False)
    assert node_checks.judged_alone(model, drifted, captured).passed
    captured.outputs[name] = 1.001 * captured.outputs[name]  # five times what one layer may differ by
    assert not node_checks.judged_alone(model, drifted, captured).passed


def test_inspect_names_the_operators(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", work / "int8", "--json") == 0
    report = stdout_json(capsys)
    operators = {layer["operator"] for layer in report["layers"]}
    assert any(name.endswith(contract.INT8_SUFFIX) for name in operators)
    assert report["facts"]["metadata"]["rankbook.activations"] == "int8"


def test_qdq_has_no_such_operator(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dialect", "qdq", "--activations", "int8", "--quiet"]
    assert run_cli("export", work / "q", "-o", work / "refused", *flags) == errors.USAGE
    assert "--activations float" in capsys.readouterr().err
