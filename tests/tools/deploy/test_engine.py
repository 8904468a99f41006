"""TensorRT-RTX engines are built on a machine without a GPU, verified, and never damage an earlier one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from rankbook.exporter.file import ExportedModel, load
from rankbook.tools import errors
from rankbook.tools.deploy import engine, engine_log, rtx_worker
from rankbook.tools.deploy.profiles import Limits, make_profiles
from rankbook.tools.runtimes import trt
from tests.tools.files import chain_model, pretend, run_cli, stdout_json

needs_rtx = pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))


@needs_rtx
@pytest.mark.trt
def test_build_writes_an_engine_whose_weights_stayed_packed(tmp_path, capsys):
    path = chain_model(tmp_path / "onnx")
    out = tmp_path / "engine"
    command = [
        "build",
        path.parent,
        "-o",
        out,
        "--compute-capability",
        "8.6",
        "120",
        "--max-batch",
        2,
        "--max-sequence",
        8,
    ]
    assert run_cli(*command, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert json.loads((out / "engine.json").read_text()) == report
    assert (out / "model.engine").stat().st_size == report["engine_bytes"]
    assert report["capabilities"] == ["SM86", "SM120"]
    assert all(check["passed"] for check in report["checks"])
    assert list(report["profiles"]) == ["prefill", "decode"]
    assert report["profiles"]["decode"]["x0"] == [[1, 1, 64], [1, 1, 64], [2, 1, 64]]
    # Three layers of 64 x 64 codes in 3 bits: 4608 bytes; unpacked to INT8 they would be 12288.
    assert 4608 <= report["constant_bytes"]["Int8"] < 12288
    assert (out / "rankbook-build.yaml").is_file()


@needs_rtx
@pytest.mark.trt
def test_a_failing_build_leaves_the_earlier_engine(tmp_path, capsys, monkeypatch):
    path = chain_model(tmp_path / "onnx", nodes=1)
    out = tmp_path / "engine"
    assert run_cli("build", path, "-o", out, "--compute-capability", "86", "--quiet") == 0
    before = (out / "model.engine").read_bytes()
    monkeypatch.setattr(engine, "make_profiles", lambda *_: {"bad": {"x0": ([1, 9, 64], [1, 1, 64], [1, 1, 64])}})
    assert run_cli("build", path, "-o", out, "--compute-capability", "86", "--quiet") == errors.CHECK_FAILED
    assert "; --keep-files keeps the builder's log" in " ".join(capsys.readouterr().err.split())
    kept = tmp_path / "engine.build.log"
    assert not kept.exists()
    assert (
        run_cli("build", path, "-o", out, "--compute-capability", "86", "--quiet", "--keep-files")
        == errors.CHECK_FAILED
    )
    assert "the builder's log is" in " ".join(capsys.readouterr().err.split())
    assert "rror" in kept.read_text()
    assert (out / "model.engine").read_bytes() == before
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


@needs_rtx
@pytest.mark.trt
def test_a_graph_whose_functions_the_parser_refuses_is_inlined(tmp_path, capsys):
    """Without the exporter's naming of the DequantizeLinear node the second use of a body fails in TensorRT-RTX 1.7."""
    path = chain_model(tmp_path / "onnx", nodes=2)
    model = load(path)
    for function in model.functions:
        for node in function.node:
            node.name = ""
    path.write_bytes(model.SerializeToString())
    out = tmp_path / "engine"
    flags = ["--compute-capability", "86", "--no-plugins", "--keep-files", "--json", "--quiet"]
    assert run_cli("build", path, "-o", out, *flags) == 0
    report = stdout_json(capsys)
    assert " inlined.onnx " in report["commands"]["polygraphy"]
    assert (report["plugin_layers"], report["plugin_form"]) == (0, ""), "no plugins, so nothing of where they are"
    assert (out / "inlined.onnx").is_file()
    assert (out / "build.log").is_file()


def test_a_folder_that_is_not_an_engine_is_not_replaced(tmp_path, capsys):
    path = chain_model(tmp_path / "onnx", nodes=1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    assert run_cli("build", path, "-o", tmp_path / "precious") in (errors.USAGE, errors.MISSING)
    assert (tmp_path / "precious" / "thesis.txt").is_file()


def test_target_trt_without_a_gpu_says_why_and_ends_with_3(tmp_path, capsys, monkeypatch):
    pretend(monkeypatch, "trt", "no NVIDIA GPU")
    assert run_cli("build", tmp_path, "-o", tmp_path / "e", "--target", "trt") == errors.MISSING
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--target", "rtx"), "TensorRT-RTX has no plugins of the form"),
        (("--target", "trt", "--self-contained"), "--plugins aot and --self-contained contradict each other"),
        (("--target", "trt", "--no-plugins"), "--plugins aot and --no-plugins contradict each other"),
    ],
)
def test_kernels_as_ptx_in_the_engine_exclude_other_forms(flags, message, tmp_path, capsys):
    assert run_cli("build", tmp_path, "-o", tmp_path / "e", "--plugins", "aot", *flags) == errors.USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SM90", "9", "x"])
def test_unknown_capabilities_are_refused(name, tmp_path, capsys):
    assert run_cli("build", tmp_path, "-o", tmp_path / "e", "--compute-capability", name) in (
        errors.USAGE,
        errors.MISSING,
    )
    assert "SM86" in capsys.readouterr().err or trt.rtx_unavailable()


def test_profiles_follow_the_names_of_the_inputs():
    inputs: dict[str, list[int | str]] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "past_key_values.0.key": ["batch", 2, "past", 8],
    }
    profiles = make_profiles(inputs, Limits(batch=4, sequence=16, context=64))
    assert profiles["prefill"] == {
        "input_ids": ([1, 1], [1, 8], [4, 16]),
        "attention_mask": ([1, 1], [1, 8], [4, 64]),
        "past_key_values.0.key": ([1, 2, 0, 8], [1, 2, 0, 8], [4, 2, 63, 8]),
    }
    assert profiles["decode"] == {
        "input_ids": ([1, 1], [1, 1], [4, 1]),
        "attention_mask": ([1, 1], [1, 33], [4, 64]),
        "past_key_values.0.key": ([1, 2, 0, 8], [1, 2, 32, 8], [4, 2, 63, 8]),
    }


@pytest.mark.parametrize("limits", [{"batch": 0}, {"sequence": 9, "context": 8}])
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=r"at least 1|raise --max-context"):
        Limits(**limits)


@pytest.mark.parametrize(
    "line",
    [
        "Name: x" * 60_000,
        "Name: a, LayerType: kgen, " + "Inputs: [ { Name: x], Constants: [" * 12_000,
        "Name: a, LayerType: kgen, Inputs: [], Constants: ["
        + "{ Name: x, Dimensions: [1] " * 16_000
        + "], Outputs: [}]",
        "Name: a, LayerType: kgen, Inputs: [], Constants: [" + "{ Name: x" * 45_000 + "], Outputs: [}]",
    ],
    ids=["ports", "parts", "tensors", "names"],
)
def test_no_line_of_a_log_takes_longer_than_it_is_long(line: str, tmp_path):
    """420 KB took 28 s and more: each beginning was tried to the end of the line."""
    (tmp_path / "build.log").write_text(line + "\n")
    start = time.process_time()
    engine_log.read(tmp_path / "build.log")
    assert time.process_time() - start < 2


def test_the_log_is_read_line_by_line(tmp_path):
    constant = "Dimensions: [2,3], Strides: [3,1], StrideOrder: [1,0], Datatype: {}, Format: (Linear)"
    name = "Name: __myl_Cast_myl{}_4, LayerType: kgen, Inputs: [], Constants: [ {{ Name: codes_constantInt8_myl{}, "
    lines = [
        "INFO Total Activation Memory: 10 bytes",
        "INFO Total Activation Memory: 20 bytes",
        "INFO Total Weights Memory: 1234 bytes",
        "VERBOSE " + name.format(0, 0) + constant.format("Int8") + " }], Outputs: [ { Name: y, Datatype: Float }]",
        name.format(1, 1) + constant.format("Int8") + " }], Outputs: [ { Name: y, Datatype: Float }]",
        " Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,64]",
        " Name: y, IOMode: Output, DataType: Float, Dimensions: [-1,64]",
    ]
    path = tmp_path / "build.log"
    path.write_text("\n".join(lines))
    log = engine_log.read(path)
    assert (log.weights_bytes, log.activation_bytes) == (1234, 20)
    assert log.layers == {"kgen": 2}
    assert log.constant_bytes() == {"Int8": 6}
    assert (log.inputs, log.outputs) == (["x"], ["y"])


def test_inlined_bodies_compute_the_same_and_have_unique_names(tmp_path):
    from rankbook.tools.runtimes import ort

    path = chain_model(tmp_path / "onnx")
    model = ExportedModel.open(path)
    inlined = engine.inline_bodies(model.proto, model, tmp_path)
    graph = load(inlined)
    names = [node.name for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    assert len(names) >= 3
    assert len(set(names)) == len(names)
    assert not graph.functions
    x = np.random.default_rng(0).standard_normal((1, 2, 64)).astype(np.float32)
    first = ort.session(path).run(None, {"x0": x})[0]
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert (moved / "model.onnx.data").readlink() == Path("onnx/model.onnx.data")
    second = ort.session((moved / inlined.name).read_bytes(), data_folder=moved / "onnx").run(None, {"x0": x})[0]
    np.testing.assert_array_equal(first, second)


class TimingSettings:
    """Stands for a builder's configuration that refuses timings of another GPU."""

    def __init__(self, *, fits: bool) -> None:
        self.fits, self.used = fits, None

    def create_timing_cache(self, data):
        return data

    def set_timing_cache(self, cache, *, ignore_mismatch):
        assert not ignore_mismatch
        if cache and not self.fits:
            return False
        self.used = cache
        return True


@pytest.mark.parametrize(("stored", "fits", "used"), [(b"t", True, b"t"), (b"t", False, b""), (None, True, b"")])
def test_timings_are_taken_over_unless_they_belong_to_another_gpu(stored, fits, used, tmp_path):
    if stored is not None:
        (tmp_path / "timing.cache").write_bytes(stored)
    settings = TimingSettings(fits=fits)
    rtx_worker._start_from_timings(settings, tmp_path / "timing.cache")
    assert settings.used == used
