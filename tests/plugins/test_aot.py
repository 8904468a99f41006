"""Plugins inside engines: what TensorRT is told, and the kernels' PTX, executed with the launch that it is given.

TensorRT 11 itself registers them and asks for type, shape, kernel and launch (its Python bindings over the lean
runtime; its builder needs a GPU). The PTX is interpreted as in test_ptx.py. No engine has been built in this form.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import aot
from tests.calibration.records import random_record
from tests.ops.cases import Op, random_x, relative_error
from tests.ops.runners import Runner, check, cuda_kernels
from tests.plugins.ptx import machine, parser, semantics
from tests.plugins.ptx.memory import Array, Device
from tests.plugins.toolchain import EXPECTED, lean_environment_in, lean_unavailable

built = pytest.mark.skipif(aot.unavailable() is not None and not EXPECTED, reason=str(aot.unavailable()))
needs_lean = pytest.mark.skipif(lean_unavailable() is not None and not EXPECTED, reason=str(lean_unavailable()))
TYPES = {"float16": "fp16", "float32": "fp32", "uint16": "bf16", "int8": "int8", "int64": "int64"}


@pytest.fixture(scope="module")
def lean_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a process that imports TensorRT's bindings."""
    return lean_environment_in(tmp_path_factory.mktemp("stubs"))


def run(op_name: str, tensors: dict[str, Array], attributes: Any, type_: str, y: Array) -> Array:
    """Do what TensorRT does with a layer: choose the kernel, evaluate the launch, pass addresses and integers."""
    first, *constants = tensors
    types = {name: TYPES[str(value.dtype)] for name, value in tensors.items()} | {first: type_}
    launch = aot.launch(op_name, attributes, {name: tensors[name].shape for name in constants}, types)
    items = tensors[first].size
    if launch.panels:
        items //= attributes["in_features"]
    grid = (launch.panels, 1, -(-items // aot.TOKENS)) if launch.panels else (min(items, 65535), 1, 1)
    return execute(launch.ptx, launch.kernel, tensors, [items, *launch.sizes], grid, launch.shared, y)


def execute(
    ptx: str,
    name: str,
    tensors: dict[str, Array],
    integers: list[int],
    grid: tuple[int, int, int],
    shared: int,
    y: Array,
) -> Array:
    """Interpret a kernel that takes addresses of inputs, integers, and the address of y."""
    device = Device()
    addresses = [device.add(value) for value in tensors.values()]
    out = device.add(y, writable=True)
    kernel = parser.parse(ptx, f"^{name}$")
    arguments = np.array(addresses, np.uint64).tobytes() + np.array(integers, np.int32).tobytes()
    arguments += bytes(-len(arguments) % 8) + np.array([out], np.uint64).tobytes()
    steps = semantics.compile_kernel(kernel)
    machine.run(kernel, steps, device, arguments, grid=grid, shared=shared, threads=aot.THREADS)
    return device.array(out)


# Changes to the record, type of x, tokens. Every width, forms of every constant, more tokens than a block takes.
PRODUCTS: dict[str, tuple[dict[str, Any], str, int]] = {
    "2 bits": ({"bits": 2, "planes": 2, "in_features": 64, "group": 64, "has_offset": True}, "float16", 1),
    "3 bits, branch, bias": ({"bits": 3, "planes": 1, "in_features": 64, "rank": 9, "bias": True}, "bfloat16", 9),
    "4 bits": ({"bits": 4, "planes": 2, "in_features": 80, "group": 16, "out_features": 33}, "float16", 3),
    "4 bits, branch": ({"bits": 4, "planes": 1, "in_features": 64, "rank": 2, "factor_bits": 16}, "float16", 8),
    "8 bits, fp16 params": ({"bits": 8, "planes": 1, "in_features": 64, "param_bits": 16}, "float16", 2),
}


@built
@pytest.mark.parametrize("case", list(PRODUCTS))
def test_products(case: str) -> None:
    changes, dtype, tokens = PRODUCTS[case]
    record = random_record(**{"group": 32, **changes})

    def interpreted(op: Op) -> Array:
        inputs = {"x": op.x if dtype == "float16" else op.x.view(np.uint16), **op.constants()}
        y = np.full((tokens, record.out_features), -1).astype(inputs["x"].dtype)
        return run(op.op_type, inputs, op.attributes, {"float16": "fp16", "bfloat16": "bf16"}[dtype], y).view(
            op.x.dtype
        )

    check(Runner("aot", lambda: None, interpreted, cuda_kernels, {}), Op.of(record, random_x(record, dtype, (tokens,))))


@built
def test_look_ups() -> None:
    record = random_record(bits=4, planes=2, out_features=70, in_features=80)
    op = Op.of(record, np.array([[0, 69], [33, 32]]), gather=True)
    y = np.zeros((2, 2, 80), np.float32)
    got = run(op.op_type, op.inputs, op.attributes, "int64", y)
    # Both sides work in fp32; they differ in the order of a sum over planes.
    np.testing.assert_allclose(got, op.expected(), rtol=0, atol=2e-6)


@built
def test_every_kernel_that_may_be_named_is_there() -> None:
    from rankbook.plugins import layout, library

    for bits in layout.BITS:
        module = library.library(f"aot-{bits}").read_text()
        for planes in (1, 2, 4):
            kernels = [f"rankbook_gather{bits}_{planes}"]
            for type_ in aot.TYPES:
                kernels += [f"rankbook_matmul{form}{bits}_{planes}_{type_}" for form in ("", "_low_rank")]
            for name in kernels:
                text = aot.kernel_text(module, name)
                assert parser.entries(text) == [name]
                assert ".target sm_80" in text


@pytest.mark.parametrize(
    ("changes", "type_", "message"),
    [
        ({"in_features": 60, "group": 60}, "fp16", "in_features is 60; .* a multiple of 8"),
        ({"bits": 3, "in_features": 96, "group": 48}, "fp16", "groups of 48 inputs at 3 bits"),
        ({}, "fp32", "x is fp32; kernels inside an engine take fp16 or bf16"),
    ],
)
def test_what_no_kernel_serves_is_refused(changes: dict[str, Any], type_: str, message: str) -> None:
    record = random_record(**changes)
    op = Op.of(record, random_x(record))
    tensors = op.constants()
    types = {name: TYPES[str(value.dtype)] for name, value in tensors.items()} | {"x": type_}
    with pytest.raises(ValueError, match=message):
        aot.launch(op.op_type, op.attributes, {n: t.shape for n, t in tensors.items()}, types)


# ------------------------------------------------------------------------------------------------ TensorRT 11


TRT_TYPES = {"float16": "HALF", "float32": "FLOAT", "int8": "INT8", "int64": "INT64"}


def ask_tensorrt(environment: dict[str, str], op: str, attributes: Any, tensors: dict[str, Array]) -> dict[str, Any]:
    """Register the plugins in a process of its own and ask about one layer."""
    request = {
        "op": op,
        "attributes": {name: int(attributes[name]) for name in ("in_features", "out_features", "offset")},
        "shapes": [list(value.shape) for value in tensors.values()],
        "types": [TRT_TYPES[str(value.dtype)] for value in tensors.values()],
    }
    command = [sys.executable, str(Path(__file__).with_name("aot_child.py")), json.dumps(request)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@built
@needs_lean
def test_tensorrt_registers_the_plugins_and_is_told_what_to_launch(lean_environment: dict[str, str]) -> None:
    record, tokens = random_record(bits=4, planes=1, in_features=64, group=32, rank=2), 9
    op = Op.of(record, random_x(record, "float16", (1, tokens)))
    tensors = op.inputs
    report = ask_tensorrt(lean_environment, op.op_type, op.attributes, tensors)
    assert sorted(report["creators"]) == sorted(aot.names())
    assert report["y"] == ["HALF", [1, tokens, record.out_features]]
    assert set(report["formats"]) == {"LINEAR"}
    launch = report["launch"]
    assert [launch[f"block_{axis}"] for axis in "xyz"] == [aot.THREADS, 1, 1]
    grid = (launch["grid_x"], launch["grid_y"], launch["grid_z"])
    y = np.full((1, tokens, record.out_features), -1, np.float16)
    got = execute(report["ptx"], report["kernel"], tensors, report["integers"], grid, launch["shared_mem"], y)
    # fp16: weights are rounded to 11 bits of mantissa. test_products holds the kernels to tighter bounds.
    assert relative_error(got, op.expected()) < 4e-3


@built
@needs_lean
def test_tensorrt_is_told_about_look_ups(lean_environment: dict[str, str]) -> None:
    record = random_record(bits=4, planes=2, out_features=70, in_features=80)
    op = Op.of(record, np.array([[0, 69, 33]]), gather=True)
    report = ask_tensorrt(lean_environment, op.op_type, op.attributes, op.inputs)
    assert report["y"] == ["FLOAT", [1, 3, 80]]
    assert report["kernel"] == "rankbook_gather4_2"
    assert (report["launch"]["grid_x"], report["integers"][0]) == (3, 3)
