"""The main job on a tiny model, through the command line: quantize, export, eval, generate, parity, inspect, build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from rankbook.plugins.library import unavailable as library_unavailable
from rankbook.tools import errors
from rankbook.tools.generation.loop import GenerateOptions, NextTokens
from rankbook.tools.runtimes import trt
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.tiny import tiny_model, write_text
from tests.tools.files import damage, note_hash, run_cli, stdout_json


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a tiny Llama, its checkpoint ``q`` and its exported file ``onnx``."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_model("llama", folder / "model")
    write_text(folder / "text.txt")
    how = ["--bits", 3, "--rank", 2, "--effort", "fast", "--error-branch", "lqer", "--error-rank", 4]
    calib = ["--calib", folder / "text.txt", "--calib-sequences", 4, "--calib-length", 64]
    assert run_cli("quantize", folder / "model", *how, *calib, "-o", folder / "q", "--quiet") == 0
    assert run_cli("export", folder / "q", "-o", folder / "onnx", "--logits", "all", "--quiet") == 0
    return folder


def test_outputs_hold_the_configuration_that_made_them(work):
    assert "bits: 3" in (work / "q" / "rankbook-quantize.yaml").read_text()
    assert f"checkpoint: {work / 'q'}" in (work / "onnx" / "rankbook-export.yaml").read_text()


def test_the_same_seed_gives_the_same_bytes(work, tmp_path):
    """A second run of both verbs; what tells of the run (times, paths) is in files of its own and in the manifest."""
    how = ["--bits", 3, "--rank", 2, "--effort", "fast", "--error-branch", "lqer", "--error-rank", 4]
    calib = ["--calib", work / "text.txt", "--calib-sequences", 4, "--calib-length", 64]
    assert run_cli("quantize", work / "model", *how, *calib, "-o", tmp_path / "q", "--quiet") == 0
    assert run_cli("export", work / "q", "-o", tmp_path / "onnx", "--logits", "all", "--quiet") == 0
    for folder, least in (("q", 3), ("onnx", 4)):
        names = {
            path.name
            for path in (work / folder).iterdir()
            if path.suffix in (".safetensors", ".json", ".onnx", ".data")
        }
        names -= {"rankbook.json"}
        assert len(names) >= least
        assert [
            name for name in names if (work / folder / name).read_bytes() != (tmp_path / folder / name).read_bytes()
        ] == []
    first, second = (json.loads((place / "q" / "rankbook.json").read_text())["files"] for place in (work, tmp_path))
    assert {name: item for name, item in first.items() if name != "README.md"} == {
        name: item for name, item in second.items() if name != "README.md"
    }


@pytest.mark.parametrize("verb", ["quantize", "export"])
def test_a_finished_output_is_not_replaced_unasked(verb, work, capsys):
    source, output = (work / "model", work / "q") if verb == "quantize" else (work / "q", work / "onnx")
    assert run_cli(verb, source, "-o", output) == errors.USAGE
    assert "--overwrite" in capsys.readouterr().err


def test_a_group_size_that_does_not_divide_is_an_error_that_names_those_that_do(work, tmp_path, capsys):
    assert run_cli("quantize", work / "model", "--group-size", 40, "-o", tmp_path / "x", "--quiet") == errors.USAGE
    assert "choose one of 16, 48" in capsys.readouterr().err


def test_eval_judges_checkpoint_and_file_alike(work, capsys):
    common = ["--text", work / "text.txt", "--context", 64, "--max-tokens", 512, "--json", "--quiet"]
    results = []
    for name in ("q", "onnx"):
        assert run_cli("eval", work / name, *common, "--reference", work / "model") == 0
        results.append(stdout_json(capsys))
    for result in results:
        assert {"perplexity", "kl", "top1_agreement", "tokens", "seconds", "reference_perplexity"} <= set(result)
        assert result["tokens"] == 8 * 63
        assert result["kl"] > 0
    # The same weights in both: they differ by the rounding of float32 sums only.
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-5)
    assert results[0]["kl"] == pytest.approx(results[1]["kl"], rel=1e-2, abs=1e-8)


def test_eval_without_a_reference_says_null(work, capsys):
    assert run_cli("eval", work / "q", "--text", work / "text.txt", "--context", 64, "--json", "--quiet") == 0
    result = stdout_json(capsys)
    assert result["kl"] is None
    assert result["top1_agreement"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "empty.txt"], "is empty"),
        (["--text", "nowhere.txt"], "is not a file"),
        (["--text", "text.txt", "--context", "1"], "at least 2"),
    ],
)
def test_eval_refuses_bad_input(arguments, said, work, capsys, monkeypatch):
    monkeypatch.chdir(work)
    (work / "empty.txt").write_text(" \n")
    assert run_cli("eval", "q", *arguments, "--quiet") == errors.USAGE
    assert said in capsys.readouterr().err


def test_greedy_tokens_of_torch_and_onnx_runtime_agree(work):
    """float32 on both sides: logits differ by 1e-6, the two best ones of a random model by far more."""
    models = TorchModel(work / "q"), OrtModel(work / "onnx")
    options = GenerateOptions(max_new_tokens=24, ignore_eos=True)
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 256, 7).tolist()
        ids = [list(NextTokens(model, prompt, options)) for model in models]
        assert ids[0] == ids[1]
        assert len(ids[0]) == 24


def test_generate_streams_text_and_repeats_with_its_seed(work, capsys):
    command = ["generate", work / "onnx", "-p", "the quick", "--max-new-tokens", 12, "--ignore-eos", "--temperature", 1]
    assert run_cli(*command, "--top-p", 0.9, "--seed", 3, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["tokens"] == len(report["ids"]) == 12
    assert run_cli(*command, "--top-p", 0.9, "--seed", 3) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == report["text"].strip()
    assert "tokens/s" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", ""], "prompt is empty"),
        (["-p", "x", "--chat"], "no chat template"),
        (["-p", "x", "--top-p", "0"], "not a probability"),
        (["-p", "x", "--temperature", "-1"], "negative"),
    ],
)
def test_generate_refuses_bad_input(arguments, said, work, capsys):
    assert run_cli("generate", work / "onnx", *arguments) == errors.USAGE
    assert said in capsys.readouterr().err


def test_parity_holds_for_a_file_exported_with_no_flags(work, tmp_path, capsys):
    """It has the last position's logits alone, which in PyTorch are a view into all of them."""
    assert run_cli("export", work / "q", "-o", tmp_path / "onnx", "--quiet") == 0
    capsys.readouterr()
    assert run_cli("parity", tmp_path / "onnx", "--no-layers", "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["passed"]
    assert 0 < report["logits"]["error"] < 1e-5  # float32 on both sides
    exact = ["parity", tmp_path / "onnx", "--no-layers", "--tolerance", 0, "--json", "--quiet"]
    assert run_cli(*exact) == errors.CHECK_FAILED
    assert stdout_json(capsys)["tolerance"] == 0


def test_parity_holds_and_reports_every_layer(work, tmp_path, capsys):
    out = tmp_path / "parity.json"
    assert run_cli("parity", work / "onnx", "-o", out, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert json.loads(out.read_text()) == report
    assert report["passed"]
    assert report["first_bad_layer"] is None
    assert report["problems"] == []
    assert report["top1_agreement"] == 1
    assert len(report["layers"]) == 14
    assert sum(item["nodes"] for item in report["operators"]) == 14
    # float32 on both sides.
    assert max(layer["error"] for layer in report["layers"]) < 1e-5
    assert report["cached"]["error"] < 1e-5
    assert report["greedy"] == []


def test_parity_continues_prompts_with_both(work, capsys):
    command = ["parity", work / "onnx", "--no-layers", "--greedy", 64]
    assert run_cli(*command, "--json", "--quiet") == 0
    checks = stdout_json(capsys)["greedy"]
    assert len(checks) == 5
    assert all(check["same"] == check["tokens"] == 64 for check in checks)


def test_parity_of_a_damaged_file_fails_and_names_the_layer(work, tmp_path, capsys):
    shutil.copytree(work / "onnx", tmp_path / "onnx")
    bad = "model.layers.1.self_attn.o_proj"
    damage(tmp_path / "onnx", f"{bad}.codes")
    assert run_cli("parity", tmp_path / "onnx", "--checkpoint", work / "q", "--json", "--quiet") == errors.CHECK_FAILED
    report = stdout_json(capsys)
    assert not report["passed"]
    assert report["first_bad_layer"] == bad
    assert report["own_error"] > report["tolerance"]
    before = [layer for layer in report["layers"] if layer["name"].startswith("model.layers.0.")]
    assert all(layer["passed"] for layer in before)


def test_a_layer_whose_input_is_already_wrong_is_told_apart(work, tmp_path, capsys):
    """A damaged norm is no packed layer: the first one after it is named, and found to be right by itself."""
    shutil.copytree(work / "onnx", tmp_path / "onnx")
    _damage_norm(tmp_path / "onnx" / "model.onnx", "layers.1.input_layernorm")
    assert run_cli("parity", tmp_path / "onnx", "--checkpoint", work / "q") == errors.CHECK_FAILED
    shown = " ".join(capsys.readouterr().out.split())
    assert "first layer out of tolerance: model.layers.1.self_attn." in shown
    assert "its input is already wrong" in shown


def _damage_norm(path: Path, name: str) -> None:
    model = onnx.load(path)
    tensor = next(item for item in model.graph.initializer if name in item.name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    path.with_name("model.onnx.data").unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data")
    note_hash(path.parent)


def test_parity_without_its_checkpoint_asks_for_it(work, tmp_path, capsys):
    shutil.copytree(work / "onnx", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "rankbook-export.yaml").unlink()
    assert run_cli("parity", tmp_path / "elsewhere") == errors.USAGE
    assert "--checkpoint" in capsys.readouterr().err


def test_inspect_tells_the_same_of_checkpoint_and_file(work, capsys):
    layers, left = [], []
    for name in ("q", "onnx"):
        assert run_cli("inspect", work / name, "--json") == 0
        found = stdout_json(capsys)
        layers.append({layer["name"]: layer for layer in found["layers"]})
        left.append(found["facts"]["left_in_float"])
    assert left[0] == left[1]
    assert left[0]["largest"].keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert layers[0].keys() == layers[1].keys()
    for name, layer in layers[0].items():
        other = layers[1][name]
        for key in ("method", "bits", "out_features", "in_features", "group", "planes", "error_rank", "error"):
            assert layer[key] == other[key], (name, key)
        assert layer["error_rank"] == 4
        assert layer["error"] is not None


@pytest.mark.trt
@pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))
def test_an_engine_is_built_from_the_file(work, tmp_path, capsys):
    limits = ["--max-batch", 2, "--max-sequence", 16, "--max-context", 32, "--compute-capability", "SM86"]
    assert run_cli("build", work / "onnx", *limits, "-o", tmp_path / "engine", "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert {check["name"]: check["passed"] for check in report["checks"]} == dict.fromkeys(
        [
            "inputs",
            "outputs",
            "engine inputs",
            "engine outputs",
            "profiles",
            "codes stayed packed",
            "weights",
            "engine layers",
            "plugin layers",
        ],
        True,
    )
    assert run_cli("inspect", tmp_path / "engine", "--json") == 0
    inspected = stdout_json(capsys)
    assert inspected["kind"] == "engine"
    assert len(inspected["layers"]) == 14


@pytest.mark.skipif(library_unavailable("ort") is not None, reason=str(library_unavailable("ort")))
def test_native_kernels_pass_the_same_parity(work, capsys):
    assert run_cli("parity", work / "onnx", "--kernels", "native", "--json", "--quiet") == 0
    assert stdout_json(capsys)["passed"]


def test_native_kernels_that_are_not_built_are_said_so(work, capsys, monkeypatch):
    monkeypatch.setattr("rankbook.plugins.library.unavailable", lambda _: "run `make native`")
    assert run_cli("generate", work / "onnx", "-p", "x", "--kernels", "native") == errors.MISSING
    assert "make native" in capsys.readouterr().err
    assert run_cli("generate", work / "onnx", "-p", "x", "--max-new-tokens", 2, "--json", "--quiet") == 0
    assert stdout_json(capsys)["kernels"] == "bodies"


def test_models_are_timed_in_turns(work, capsys, tmp_path):
    onnx = work / "onnx"
    flags = ["--repeats", 1, "--steps", 2, "--prompt", 4, "--prefill", 8, "--threads", 1, "-o", tmp_path]
    assert run_cli("bench", f"{onnx}@bodies", onnx, *flags, "--json", "--quiet") == 0
    bodies, last = stdout_json(capsys)["models"]
    assert bodies["kernels"] == "bodies"
    assert last["decode_ratios"] == last["prefill_ratios"] == {}
    assert bodies["decode_ratios"].keys() == bodies["prefill_ratios"].keys() == {last["name"]}
    assert bodies["decode"] > 0
    assert 2 < bodies["bits"] < 16
    assert bodies["memory"]["peak_rss"] > bodies["memory"]["baseline_rss"] > 0
    assert (tmp_path / "bench.md").is_file()
