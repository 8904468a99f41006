"""Engines of a cache of a fixed length: written in place, read by one fused attention kernel a layer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.calibration.checkpoint.output import check_replaceable
from rankbook.calibration.source import ENGINE_NAME
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.plugins import library
from rankbook.tools import errors
from rankbook.tools.deploy import engine, engine_log, polygraphy_network, step
from rankbook.tools.deploy.checks import check_parser
from rankbook.tools.deploy.manifest import Manifest
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.dev import family_models
from rankbook.tools.runtimes import open_model, trt
from rankbook.tools.runtimes.trt_engine import RUNTIME_CACHE_NAME
from tests import tensorrt_stand_in as stand_in
from tests.exporter.checkpoints import make_checkpoint
from tests.exporter.rtx import build as rtx_build
from tests.tiny import FAMILIES
from tests.tools.files import run_cli

needs_rtx = pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M but for its 30 blocks, of which `tests.tiny` makes 2, and its vocabulary."""
LIMITS: dict[str, Any] = {"compute_capability": ("SM89",), "max_sequence": 32, "max_context": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the shape of SmolLM2."""
    return make_checkpoint(tmp_path_factory.mktemp("smollm2"), "llama", model=SMOLLM2, bits=4, group_size=64)


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of it, with the best token as an output."""
    out = tmp_path_factory.mktemp("built") / "engine"
    flags = ["--compute-capability", 89, "--max-sequence", 32, "--max-context", 64, "--sample", "greedy"]
    assert run_cli("build", checkpoint, "-o", out, *flags, "--quiet") == 0
    return out


@needs_rtx
@pytest.mark.trt
def test_a_checkpoint_becomes_an_engine_that_writes_its_cache_in_place(built):
    out, report = built, json.loads((built / "engine.json").read_text())
    checks = {item["name"]: (item["passed"], item["detail"]) for item in report["checks"]}
    assert all(passed for passed, _ in checks.values()), checks
    assert checks["cache updates in place"][1] == "4 of 4"
    assert checks["fused attention"][1] == "2 in prefill, 2 in decode, of 2 nodes"
    assert report["kernels"]["prefill"]["gemm attention"] == report["kernels"]["decode"]["gemv attention"] == 2
    assert report["kernels"]["decode"]["copies of a cache"] == 0
    # Two layers of keys and values, 3 heads, 64 positions, 64 numbers of 2 bytes; float32 logits and one token.
    assert report["step_bytes"]["cache"] == 4 * 3 * 64 * 64 * 2
    assert report["step_bytes"]["outputs"] == 4 * 259 + 8
    assert report["profiles"]["decode"]["past_key_values.1.value"] == [[1, 3, 64, 64]] * 3
    assert report["source"]["metadata"]["rankbook.max_context"] == "64"
    assert report["source"]["path"] == f"{engine.GRAPH}/model.onnx", "the folder may be moved"
    names = {item.name for item in out.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    commands = (out / engine.COMMANDS).read_text()
    assert all(command in commands for command in report["commands"].values())
    assert f"--onnx={engine.GRAPH}/model.onnx" in report["commands"]["trtexec"], "the folder may be moved"


@needs_rtx
@pytest.mark.trt
def test_a_folder_that_was_moved_is_built_again_and_opens(built, tmp_path, monkeypatch):
    """By its commands, with the plugin library where it is now; nothing of the old place is looked at."""
    moved = shutil.copytree(built, tmp_path / "far" / "moved")
    text = (moved / engine.COMMANDS).read_text()
    assert str(built) not in text + (moved / "engine.json").read_text()
    environment = trt.rtx_environment(tmp_path / "libraries")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if json.loads((moved / "engine.json").read_text())["plugin_layers"]:
        here = shutil.copy(library.library("trt"), tmp_path)
        text = text.replace(str(library.library("trt")), "/gone/librankbook_trt.so")
        environment[polygraphy_network.LIBRARY_VARIABLE] = str(here)
    (moved / engine.COMMANDS).write_text(text)
    first = (moved / ENGINE_NAME).rename(tmp_path / "first")
    done = subprocess.run(
        ["sh", moved / engine.COMMANDS], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (moved / ENGINE_NAME).stat().st_size > 0, done.stdout[-3000:] + done.stderr[-3000:]
    first.replace(moved / ENGINE_NAME)
    state = stand_in.install(monkeypatch, memory=stand_in.HostMemory(capability="SM89"))
    state.folders.append(moved)
    shutil.move(built / engine.GRAPH, tmp_path / "away")  # what is opened is the copy
    try:
        model = open_model(moved)
        assert np.isfinite(model.start(np.arange(3)[None])).all()
        assert model.packed[1] > 0
    finally:
        shutil.move(tmp_path / "away", built / engine.GRAPH)


@needs_rtx
@pytest.mark.trt
def test_a_cache_that_grows_is_joined_in_every_step(checkpoint, built, tmp_path):
    export(checkpoint, tmp_path / "onnx", ExportOptions(dtype="fp16"))
    growing = engine.build(tmp_path / "onnx", tmp_path / "growing", BuildOptions(**LIMITS))
    fixed = json.loads((built / "engine.json").read_text())
    assert growing.passed
    assert growing.kernels["decode"][step.COPIES] >= 4
    assert fixed["kernels"]["decode"]["all"] - 2 < growing.kernels["decode"]["all"], "two kernels choose the token"
    assert growing.step_bytes["cache"] == fixed["step_bytes"]["cache"] // 64 * 63


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
def test_attention_that_is_spelled_out_is_said(tmp_path):
    """Gemma 2 caps its scores, for which TensorRT has no kernel: the cache is turned in each step."""
    checkpoint = make_checkpoint(tmp_path, "gemma2", bits=4)
    report = engine.build(checkpoint, tmp_path / "engine", BuildOptions(**LIMITS))
    assert report.passed, report.checks
    assert next(item for item in report.checks if item.name == "fused attention").detail.endswith("README.md")
    assert report.kernels["decode"][step.COPIES] > 0


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
def test_attention_that_is_spelled_out_may_be_fused(tmp_path):
    """The builder recognizes that of BLOOM, whose scores have a slope for each head (ALiBi)."""
    family_models.tiny("bloom", tmp_path / "model")
    assert run_cli("quantize", tmp_path / "model", "--method", "rtn", "--bits", 4, "-o", tmp_path / "q", "--quiet") == 0
    report = engine.build(tmp_path / "q", tmp_path / "engine", BuildOptions(**LIMITS))
    assert report.passed, report.checks
    assert report.kernels["prefill"]["gemm attention"] == report.kernels["decode"]["gemv attention"] == 2
    detail = next(item.detail for item in report.checks if item.name == "fused attention")
    assert detail.startswith("2 in prefill, 2 in decode, of 0 nodes")


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llama", "gemma2"}))  # of which there are engines above
def test_families_become_engines_with_fused_attention(family, tmp_path):
    """Learned positions, biases, norms of heads, windows, joint projections; heads of 12 are padded to 16."""
    checkpoint = make_checkpoint(tmp_path, family, bits=4, model={"num_hidden_layers": 1})
    report = engine.build(checkpoint, tmp_path / "engine", BuildOptions(**LIMITS, no_plugins=True))
    assert report.passed, report.checks
    assert report.kernels["prefill"]["gemm attention"] == report.kernels["decode"]["gemv attention"] == 1
    assert report.kernels["decode"][step.COPIES] == 0


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_latent_attention_and_sinks_are_one_kernel_a_layer(family, tmp_path):
    """The cache of DeepSeek V3 holds what keys and values are computed from; values are narrower, and padded."""
    family_models.tiny(family, tmp_path / "model")
    assert run_cli("quantize", tmp_path / "model", "--method", "rtn", "--bits", 4, "-o", tmp_path / "q", "--quiet") == 0
    report = engine.build(tmp_path / "q", tmp_path / "engine", BuildOptions(**LIMITS))
    assert report.passed, report.checks
    assert report.kernels["prefill"]["gemm attention"] == report.kernels["decode"]["gemv attention"] == 2
    said = next(item.detail for item in report.checks if item.name.startswith("no copy"))
    assert said == "0 kernels copy one" if family == "gpt_oss" else "computed from the cache" in said


def test_what_does_not_fit_together_is_refused(checkpoint, tmp_path, capsys):
    export(checkpoint, tmp_path / "int8", ExportOptions(graph="static", kv="int8", max_context=64))
    refusals = (
        ((tmp_path / "int8",), "floating-point numbers in place"),
        ((tmp_path / "int8", "--dtype", "fp16"), "--dtype say how a checkpoint is exported"),
        ((checkpoint, "--max-context", 16, "--max-sequence", 32), "raise --max-context"),
        ((checkpoint, "--max-context", 999), "right up to 128 positions"),
    )
    for flags, message in refusals:
        assert run_cli("build", *flags, "-o", tmp_path / "engine", "--quiet") == errors.USAGE
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "engine").exists()
    options = BuildOptions(max_context=32)
    with pytest.raises(errors.UsageError, match=r"--max-context is 32.*holds 64 positions"):
        options.limits(64)


def test_an_old_parser_is_named(checkpoint, tmp_path):
    """The operators that a version of TensorRT lacks, and the version to install; TensorRT-RTX is not asked."""
    export(checkpoint, tmp_path / "static", ExportOptions(dtype="fp16", graph="static", max_context=64))
    model = ExportedModel.open(tmp_path / "static")
    for version in ("10.15.1.29", "11.4.0.106", None):
        check_parser(model, version)
    with pytest.raises(errors.MissingError, match=r"10\.14\.1.*not know RotaryEmbedding and TensorScatter.*>=10\.15'"):
        check_parser(model, "10.14.1.48")
    with pytest.raises(errors.MissingError, match=r"know Attention and RotaryEmbedding and TensorScatter"):
        check_parser(model, "10.9.0.34")


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "INT8"])
def test_the_builder_writes_caches_of_floating_point_numbers_alone(kind, tmp_path):
    """What the README says of --kv int8 and of 8-bit floats; a builder that takes them is to be told to users."""
    cache: list[str | int | None] = ["batch", 2, 64, 16]
    new: list[str | int | None] = ["batch", 2, "s", 16]
    element = getattr(onnx.TensorProto, kind)
    inputs = [helper.make_tensor_value_info("past", element, cache), helper.make_tensor_value_info("new", element, new)]
    inputs.append(helper.make_tensor_value_info("at", onnx.TensorProto.INT64, ["batch"]))
    node = helper.make_node("TensorScatter", ["past", "new", "at"], ["present"], axis=2)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("present", element, cache)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), tmp_path / "g.onnx")
    sizes = {"past": ([1, 2, 64, 16],) * 3, "new": ([1, 2, 1, 16],) * 3, "at": ([1],) * 3}
    assert "must have type Float, Half, or BFloat16" in " ".join(rtx_build(tmp_path / "g.onnx", sizes)["errors"])


def test_kernels_are_counted_by_profile(tmp_path):
    """The number of the builder's graph says which lines belong together; only some of them name the profile."""
    tensor = "{{ Name: {}, Dimensions: [{}], Strides: [1], Datatype: Half, Format: (Linear) }}"

    def line(name: str, kind: str, reads: str, writes: str, shape: str) -> str:
        given, made = tensor.format(reads, "1,2,8,4"), tensor.format(writes, shape)
        return f"Name: {name}, LayerType: {kind}, Inputs: [ {given}], Constants: [], Outputs: [ {made}], TacticName: x"

    lines = [
        "VERBOSE KVCACHE_UPDATE present.0.key.TensorScatter.0",
        line("__myl_Scat_myl1_0", "kgen", "present.0.key", "present.0.key", "1,2,8,4"),
        line("__myl_ReplTran_myl1_1", "kgen", "present.0.key", "x", "-1,4,8"),
        line("__mye1_myl1_2", "wait", "a", "b", "1"),
        line("_gemm_mha_v2_myl1_3", "kgen", "x", "y", "4,-1,4"),
        line("proj_myl3_0", "custom_layer", "y", "z", "1,8"),
        line("_gemv_mha_v1_myl3_1", "kgen", "present.0.key [profile 1]", "w", "4,1,99"),
    ]
    (tmp_path / "build.log").write_text("\n".join(lines))
    log = engine_log.read(tmp_path / "build.log")
    shapes = {"past_key_values.0.key": ([1, 2, 8, 4],) * 3}
    assert log.updates == {"present.0.key.TensorScatter.0"}
    assert step.kernels(log, {"prefill": shapes, "decode": shapes}, slots=8) == {
        "prefill": {"all": 3, "gemm attention": 1, "copies of a cache": 1},
        "decode": {"all": 2, "gemv attention": 1, "copies of a cache": 0},
    }


def test_an_engine_that_was_run_and_moved_is_still_whole(tmp_path):
    """What a run wrote beside it is no file of somebody else, and its graph is found within the folder."""
    folder = tmp_path / "moved"
    (folder / engine.GRAPH).mkdir(parents=True)
    graph = folder / engine.GRAPH / "model.onnx"
    graph.write_bytes(b"graph")
    source = {"path": str(tmp_path / "earlier" / engine.GRAPH / "model.onnx"), "sha256": sha256_file(graph)}
    (folder / "engine.json").write_text(json.dumps({"source": source}))
    (folder / "rankbook-files.json").write_text(json.dumps({"files": ["engine.json", "onnx/model.onnx"]}))
    (folder / RUNTIME_CACHE_NAME).write_bytes(b"compiled")
    check_replaceable(folder, "engine.json")
    assert Manifest(folder, {"source": source}).exported() == graph
    (folder / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        check_replaceable(folder, "engine.json")
