"""Static INT8 activations and a cache of 8 bits, from quantize to engine; settings that exist in PyTorch only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools import errors
from rankbook.tools.runtimes import trt
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint
from tests.tiny import tiny_model, write_text
from tests.tools.files import run_cli, stdout_json

TOKENS = np.random.default_rng(0).integers(0, 256, (1, 12))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a W8A8 checkpoint ``q``, its file ``onnx``, and a file ``cache``: weights only, INT8 cache."""
    folder = tmp_path_factory.mktemp("activations")
    tiny_model("llama", folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt")
    how = ["--method", "rtn", "--bits", 8, "--group-size", "channel", "--weight-format", "symmetric"]
    how += ["--activations", "static8", "--activation-range", "minmax"]
    calib = ["--calib", folder / "text.txt", "--calib-sequences", 4, "--calib-length", 32]
    assert run_cli("quantize", folder / "model", *how, *calib, "-o", folder / "q", "--quiet") == 0
    qdq = ["--dialect", "qdq", "--logits", "all", "--quiet"]
    assert run_cli("export", folder / "q", "-o", folder / "onnx", *qdq) == 0
    assert run_cli("export", folder / "q", "-o", folder / "cache", *qdq, "--weights-only", "--kv", "int8") == 0
    return folder


def relative(got, want) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_inputs_are_quantized_once_where_layers_share_them(work):
    graph = onnx.load(work / "onnx" / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    # q, k, v; o; gate, up; down.
    assert kinds.count("QuantizeLinear") == 4
    assert kinds.count("DequantizeLinear") == 4 + 7
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {kind for name, kind in types.items() if name.startswith("input_zero")} == {onnx.TensorProto.INT8}


def test_the_file_computes_the_rounded_activations_of_torch(work):
    model, file = TorchModel(work / "q"), OrtModel(work / "onnx")
    want = model.logits(TOKENS)
    got = file.logits(TOKENS)
    # Roundings to 8 bits: where float32 sums in another order fall on the other side, a value moves by a step.
    assert relative(got, want) < 1e-2
    weights = OrtModel(work / "cache").logits(TOKENS)
    assert relative(weights, want) > 2 * relative(got, want), "the file does not just leave the rounding out"


def test_a_cache_of_8_bits_gives_the_same_token_by_token_and_close_logits(work):
    file, model = OrtModel(work / "cache"), TorchModel(work / "q")
    whole = file.logits(TOKENS)[0]
    first = file.start(TOKENS[:, :8])
    rows = [first, *(file.step(int(token)) for token in TOKENS[0, 8:])]
    assert {str(value.numpy().dtype) for name, value in file._cache.items() if name.endswith(("key", "value"))} == {
        "int8"
    }
    # Prompt and steps read the same codes; float32 sums in another order.
    assert relative(np.stack(rows), whole[7:]) < 1e-4
    from rankbook.calibration.activations.settings import override

    override(model.model, kind="none", kv_bits=0)
    # Half a step of 127 in keys and values.
    assert 0 < relative(whole, model.logits(TOKENS)[0]) < 2e-2


@pytest.mark.parametrize("name", ["onnx", "cache"])
def test_parity_generate_and_inspect_work(name, work, capsys):
    assert run_cli("parity", work / name, "--tokens", 8, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["passed"]
    assert len(report["layers"]) == 7
    assert (
        run_cli("generate", work / name, "-p", "the", "--max-new-tokens", 4, "--ignore-eos", "--json", "--quiet") == 0
    )
    assert stdout_json(capsys)["tokens"] == 4
    assert run_cli("inspect", work / name, "--json") == 0
    metadata = stdout_json(capsys)["facts"]["metadata"]
    assert metadata["rankbook.activations"] == ("static8" if name == "onnx" else "none")
    assert metadata["rankbook.kv"] == ("float" if name == "onnx" else "int8")


@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
@pytest.mark.parametrize("name", ["onnx", "cache"])
def test_engines_are_built(name, work, tmp_path, capsys):
    limits = ["--max-sequence", 8, "--max-context", 16, "--compute-capability", "SM86"]
    assert run_cli("build", work / name, *limits, "-o", tmp_path / "engine", "--json", "--quiet") == 0
    assert all(check["passed"] for check in stdout_json(capsys)["checks"])


def test_a_skipped_input_has_no_nodes(work, tmp_path):
    how = ["--method", "rtn", "--bits", 8, "--weight-format", "symmetric", "--activations", "static8"]
    how += ["--activation-skip", "*.down_proj", "*.o_proj"]
    calib = ["--calib", work / "text.txt", "--calib-sequences", 2, "--calib-length", 16]
    assert run_cli("quantize", work / "model", *how, *calib, "-o", tmp_path / "q", "--quiet") == 0
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / "onnx", "--dialect", "qdq", "--quiet") == 0
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("QuantizeLinear") == 2, "q, k, v; gate, up"


def test_settings_of_an_evaluation_are_not_exported_silently(work, tmp_path, capsys):
    how = ["--method", "rtn", "--bits", 8, "--activations", "token8", "--kv-bits", 8]
    calib = ["--calib", work / "text.txt", "--calib-sequences", 1, "--calib-length", 8]
    assert run_cli("quantize", work / "model", *how, *calib, "-o", tmp_path / "q", "--quiet") == 0
    assert run_cli("export", tmp_path / "q", "-o", tmp_path / "o", "--quiet") == errors.USAGE
    said = capsys.readouterr().err
    assert "token8" in said
    assert "--weights-only" in said


def test_eval_takes_dynamic_settings_for_any_pytorch_model(work, capsys):
    text = ["--text", work / "text.txt", "--context", 32, "--max-tokens", 64, "--json", "--quiet"]
    results = []
    for flags in ([], ["--activations", "mxint6"], ["--kv-bits", 4]):
        assert run_cli("eval", work / "model", *text, *flags) == 0
        results.append(stdout_json(capsys)["perplexity"])
    assert len(set(results)) == 3
    assert results[1:] == pytest.approx([results[0]] * 2, rel=0.1)
    assert run_cli("eval", work / "onnx", *text, "--kv-bits", 8) == errors.USAGE
    assert "PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["opt", "gemma2", "phi3"])
def test_the_cache_of_8_bits_serves_other_families(family, tmp_path):
    """Learned positions, sliding windows with a softcap, and a fused projection."""
    checkpoint = make_checkpoint(tmp_path, family, model={"num_hidden_layers": 1}, bits=8)
    export(checkpoint, tmp_path / "onnx", ExportOptions(kv="int8", logits="all"))
    file = OrtModel(tmp_path / "onnx")
    whole = file.logits(TOKENS)[0]
    rows = [file.start(TOKENS[:, :8]), *(file.step(int(token)) for token in TOKENS[0, 8:])]
    assert relative(np.stack(rows), whole[7:]) < 1e-4
    # Half a step of 127 in keys and values.
    assert 0 < relative(whole, TorchModel(checkpoint).logits(TOKENS)[0]) < 2e-2
