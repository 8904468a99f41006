"""`rankbook parity` of engines, over the stand-in of TensorRT: whole, decoding, greedy, and layer by layer."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from rankbook.exporter.file import ExportedModel
from rankbook.tools import errors
from rankbook.tools.deploy import engine as deploy
from rankbook.tools.deploy.manifest import Manifest
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.evaluate import engine_parity
from rankbook.tools.runtimes import trt
from tests import tensorrt_stand_in as stand_in
from tests.tensorrt_stand_in import State
from tests.tiny import tiny_model
from tests.tools.files import damage, run_cli

LAYER = "model.layers.1.self_attn.o_proj"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama's checkpoint ``q`` and its exported file ``onnx``."""
    folder = tmp_path_factory.mktemp("parity")
    tiny_model("llama", folder / "model")
    assert run_cli("quantize", folder / "model", "--method", "rtn", "--bits", 4, "-o", folder / "q", "--quiet") == 0
    assert run_cli("export", folder / "q", "-o", folder / "onnx", "--logits", "all", "--quiet") == 0
    return folder


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> State:
    return stand_in.install(monkeypatch)


@pytest.fixture
def engine(work: Path, tmp_path: Path, state: State) -> Path:
    options = BuildOptions(max_sequence=16, max_context=64)
    return stand_in.build(state, work / "onnx", tmp_path / "engine", options)


def parity(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """Return the exit code and the report."""
    capsys.readouterr()
    code = run_cli("parity", *arguments, "--json", "--quiet")
    shown = capsys.readouterr()
    assert shown.out, shown.err
    return code, json.loads(shown.out)


def test_an_engine_is_compared_with_its_file_and_its_checkpoint(work, engine, tmp_path, capsys):
    """Alone, through its manifest, or with the file named; three runtimes, and the outputs in polygraphy's format."""
    saved = tmp_path / "results.json"
    code, report = parity(capsys, engine, "--greedy", 4, "--results", saved, "-o", tmp_path / "parity.json")
    assert code == errors.OK
    assert report == json.loads((tmp_path / "parity.json").read_text())
    assert [item["reference"].split()[0] for item in report["references"]] == ["onnxruntime", "torch"]
    for item in report["references"]:
        assert item["top1_agreement"] == 1
        for what in ("logits", "cached"):
            assert item[what]["passed"]
            assert item[what]["error"] < 1e-5
    assert (report["missing"], report["layers"], report["first_bad_layer"]) == ([], [], None)
    assert [item["same"] for item in report["greedy"]] == [4] * 5
    assert report["runtime"] == "trt-rtx 1.7.1.116"
    _, named = parity(capsys, work / "onnx", engine, "--no-layers")
    assert named["references"] == report["references"]
    judged = judge_again(saved, 1e-12)
    assert judged[0].keys() == {"logits", "cached"}
    assert not all(judged[0].values())
    assert all(judge_again(saved, 1e-3)[0].values())


def judge_again(path: Path, tolerance: float) -> Any:
    """What somebody does with polygraphy alone: other thresholds for stored outputs, the engine against PyTorch."""
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc

    results = RunResults.load(str(path))
    judge = SimpleCompareFunc(atol=tolerance, rtol=0.0)
    return next(iter(Comparator.compare_accuracy(results, compare_func=judge, comparisons=[(0, 2)])[0].values()))


def test_an_engine_that_computes_something_else_fails_and_names_the_layer(
    work, engine, tmp_path, state, capsys, monkeypatch
):
    """A layer of it has other weights; the second engine is built as the first one was, with more outputs."""
    shutil.copytree(work / "onnx", tmp_path / "bad")
    damage(tmp_path / "bad", f"{LAYER}.codes")
    asked: list[Any] = []

    def build(request: Any, progress: Any) -> Any:
        asked.append(request)
        return stand_in.work(request, progress)

    state.data, state.roots = tmp_path / "bad", [tmp_path]
    monkeypatch.setattr(deploy, "run_worker", build)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, report = parity(capsys, engine)
    assert code == errors.CHECK_FAILED
    assert not report["references"][0]["logits"]["passed"]
    assert report["first_bad_layer"] == LAYER
    assert len(report["layers"]) == 14
    before = [layer for layer in report["layers"] if layer["name"].startswith("model.layers.0.")]
    assert all(layer["passed"] for layer in before)
    (request,) = asked
    assert request["capabilities"] == ["SM80", "SM86", "SM89", "SM120"]
    assert request["profiles"] == [*_tuples(Manifest.read(engine).facts["profiles"])]
    assert run_cli("parity", engine, "--no-layers", "--quiet") == errors.CHECK_FAILED
    assert "NO PARITY" in capsys.readouterr().out
    assert len(asked) == 1


def _tuples(profiles: Any) -> Any:
    return ({name: tuple(bounds) for name, bounds in shapes.items()} for shapes in profiles.values())


@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
def test_an_engine_with_more_outputs_is_built(work, engine, tmp_path):
    """By the real builder: every packed layer's output, with its type, beside those of the file."""
    file = ExportedModel.open(work / "onnx")
    stand_in.change(engine, capabilities=["SM86"])
    values = list(file.outputs_of.values())
    folder = engine_parity.build_marked(Manifest.read(engine), file, values, tmp_path)
    manifest = Manifest.read(folder)
    assert {
        item["name"]: item["dtype"] for item in manifest.facts["outputs"] if item["name"] in values
    } == dict.fromkeys(values, "FLOAT")
    assert {check["name"]: check["passed"] for check in manifest.facts["checks"]}["outputs"]


def test_what_is_not_there_is_said(work, engine, tmp_path, state, capsys):
    """The checkpoint is gone: no comparison with PyTorch, and a line about it; the file is gone or another one.

    So is the device that PyTorch is to compute on; nodes are those of a file.
    """
    assert run_cli("parity", engine, "--device", "cuda:99", "--quiet") == errors.MISSING
    assert "cuda:99" in capsys.readouterr().err
    assert run_cli("parity", engine, "--every-node", "--quiet") == errors.USAGE
    assert "--every-node checks the nodes of a file" in capsys.readouterr().err
    shutil.copytree(work / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx" / "rankbook-export.yaml").unlink()
    code, report = parity(capsys, tmp_path / "onnx", engine)
    assert code == errors.OK
    assert [item["reference"].split()[0] for item in report["references"]] == ["onnxruntime"]
    assert "--checkpoint DIR" in report["missing"][0]
    stand_in.change(engine, source={"path": str(tmp_path / "gone" / "model.onnx"), "sha256": "", "metadata": {}})
    assert run_cli("parity", engine, "--quiet") == errors.USAGE
    assert "is not where it was" in capsys.readouterr().err
    assert run_cli("parity", work / "onnx", engine, "--quiet") == errors.USAGE
    assert "is not the file that" in capsys.readouterr().err


def test_results_are_those_of_an_engine(work, tmp_path, capsys):
    assert run_cli("parity", work / "onnx", "--results", tmp_path / "x.json", "--quiet") == errors.USAGE
    assert "give an engine folder" in capsys.readouterr().err
