"""The numpy reference runs whole files: the logits of torch, step by step, without ONNX Runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools import errors
from rankbook.tools.runtimes import open_model
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json

GRAPHS = ("standard", "ort", "static")
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 9))
# Sums in float32 (the standard graph) and float64 (the operators of this project) against torch; 2e-7 is typical.
FP32 = 2e-6
# Eleven and eight bits in every result of two layers.
HALF = {"fp16": 1e-2, "bf16": 1e-1}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the ``checkpoint`` of a tiny Llama, its embeddings packed too, and every graph."""
    folder = tmp_path_factory.mktemp("reference")
    how = {"bits": 3, "error_branch": "lqer", "error_rank": 2, "quantize_embeddings": 8}
    checkpoint = make_checkpoint(folder, "llama", model={"head_dim": 16}, **how)
    for graph in GRAPHS:
        export(checkpoint, folder / graph, ExportOptions(graph=graph, logits="all"))
    return folder


@pytest.fixture(scope="module")
def want(work: Path) -> np.ndarray:
    """The logits of torch."""
    return TorchModel(work / "checkpoint").logits(TOKENS)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_gives_the_logits_of_torch(graph: str, work: Path, want: np.ndarray) -> None:
    model = open_model(work / graph, "reference")
    assert error(model.logits(TOKENS), want) < FP32
    steps = [model.start(TOKENS[:1, :6]), *(model.step(int(token)) for token in TOKENS[0, 6:])]
    assert error(np.stack(steps), want[0, 5:]) < FP32


def test_parity_compares_each_layer_with_torch(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", work / "checkpoint", "--kernels", "reference", "--tokens", 6, "--json", "--quiet"]
    assert run_cli("parity", work / "ort", *flags) == 0
    report = stdout_json(capsys)
    assert report["logits"]["error"] < FP32
    assert len(report["layers"]) == 15
    assert report["operators"] == [], "numpy is not its own judge"


@pytest.mark.parametrize(("dtype", "graph"), [("fp16", "ort"), ("bf16", "standard")])
def test_half_precision(dtype: str, graph: str, work: Path, want: np.ndarray, tmp_path: Path) -> None:
    """With nodes of ONNX Runtime's own, and in bf16, which it does not run on a CPU."""
    export(work / "checkpoint", tmp_path / "onnx", ExportOptions(graph=graph, dtype=dtype, logits="all"))
    assert error(open_model(tmp_path / "onnx", "reference").logits(TOKENS), want) < HALF[dtype]


def test_it_generates_and_doctor_lists_it(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["-p", "the", "--max-new-tokens", 3, "--ignore-eos", "--json", "--quiet"]
    texts = []
    for model, kernels in (("standard", "reference"), ("checkpoint", "auto")):
        assert run_cli("generate", work / model, *flags, "--kernels", kernels) == 0
        texts.append(stdout_json(capsys)["ids"])
    assert texts[0] == texts[1]
    run_cli("doctor", "--json")
    (found,) = (item for item in stdout_json(capsys)["findings"] if item["name"] == "numpy reference")
    assert found["found"]
    assert "slow" in found["enables"]


def test_an_operator_without_a_reference_is_named(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "standard", tmp_path / "onnx")
    path = tmp_path / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    node = next(node for node in model.graph.node if node.op_type == "MatMul")
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(errors.UsageError, match=r"'MatMulNBits' .* export with --dialect rankbook or qdq"):
        open_model(path, "reference")
