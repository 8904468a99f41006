"""The TensorRT plugin does what TensorRT asks of it: its host code goes through a whole life, over emulated kernels.

Node attributes to plugin, types, formats, shapes, workspace, serialization, a copy per context, enqueue; the result is
compared with the numpy reference. No GPU and no TensorRT library take part.
"""

from __future__ import annotations

import ctypes as c
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from rankbook.plugins import contract, experts
from rankbook.plugins.operators import OPERATORS
from tests.calibration.records import random_record
from tests.ops.cases import FORMS, Case, Op, random_x, relative_error
from tests.plugins import emulated
from tests.plugins.form_cases import COMBINATIONS

TRT_TYPES = {"float32": 0, "float16": 1, "int8": 2, "int64": 8}
"""nvinfer1::DataType; its values are part of TensorRT's stable interface."""


def trt_headers() -> Path | None:
    """Return the folder of TensorRT's headers, or None."""
    folders = [os.environ.get("TENSORRT_INCLUDE_DIR", "")]
    folders.append(str(emulated.ROOT / "build/tensorrt-headers/kernel_lens/include/tensorrt"))
    spec = find_spec("kernel_lens")
    if spec is not None and spec.submodule_search_locations:
        folders.append(str(Path(next(iter(spec.submodule_search_locations))) / "include" / "tensorrt"))
    folders += ["/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/local/tensorrt/include"]
    return next((Path(f) for f in folders if f and (Path(f) / "NvInferRuntime.h").is_file()), None)


pytestmark = [
    pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the plugin"),
    pytest.mark.skipif(trt_headers() is None, reason="TensorRT's headers are missing: `make native-cuda` gets them"),
]


@cache
def driver() -> c.CDLL:
    headers = trt_headers()
    assert headers is not None
    sources = [*emulated.SOURCES, *(f"shims/trt/{name}.cpp" for name in ("creator", "operator", "plugin"))]
    sources.append("shims/view.cpp")
    sources.append(str(Path(__file__).parent / "trt_driver.cpp"))
    includes = [headers, emulated.CSRC / "emulation" / "include"]
    lib = c.CDLL(str(emulated.build("rankbook_trt_emulated", sources, includes)))
    lib.rb_failure.restype = lib.rb_creators.restype = c.c_char_p
    return lib


def run(op, y, *, fields=3):
    """Run an operator; y is overwritten. Returns the shape of y."""
    lib, arena = driver(), emulated.Arena()
    values = list(op.inputs.values())
    pointers = (c.c_void_p * len(values))(*(arena.add(value) for value in values))
    ranks = (c.c_int * len(values))(*(value.ndim for value in values))
    dims = (c.c_int64 * (8 * len(values)))()
    for i, value in enumerate(values):
        dims[8 * i : 8 * i + value.ndim] = value.shape
    types = (c.c_int * len(values))(*(TRT_TYPES[str(value.dtype)] for value in values))
    numbers = [op.attributes[name] for name in ("in_features", "out_features", "offset")]
    out, y_dims = arena.add(y, writable=True), (c.c_int64 * 9)()
    arena.register(lib)
    attribute_values = (c.c_int32 * 4)(*numbers, fields)
    failed = lib.rb_run(
        op.op_type.encode(), attribute_values, len(values), ranks, dims, types, pointers, c.c_void_p(out), y_dims
    )
    if failed:
        raise RuntimeError(lib.rb_failure().decode())
    y[...] = arena.array(out)
    return tuple(y_dims[1 : 1 + y_dims[0]])


def test_there_is_one_creator_per_operator():
    lines = [line.split() for line in driver().rb_creators().decode().splitlines()]
    assert sorted(line[0] for line in lines) == sorted(name for name, each in OPERATORS.items() if each.has_plugin)
    for _, namespace, version, *fields in lines:
        assert namespace == contract.PLUGIN_NAMESPACE
        assert version == contract.PLUGIN_VERSION
        # The parser drops attributes that no field names, and warns about fields without an attribute.
        assert sorted(fields) == sorted(a.name for a in contract.PACKED["CodebookMatMul4"].attributes)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", list(FORMS))
def test_products(case, dtype):
    op = FORMS[case].draw(dtype=dtype)
    y = np.zeros((2, 3, op.record.out_features), dtype)
    assert run(op, y) == y.shape
    # fp16: weights are rounded to 11 bits of mantissa. tests/ops holds the kernels to tighter bounds.
    assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" else 4e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "rank"), [(2, 0), (3, 2), (4, 0), (8, 3)])
def test_products_of_rounded_activations(bits, rank, dtype):
    record = random_record(bits=bits, in_features=256, group=128, rank=rank)
    for tokens in (1, 6, 40):
        op = Op.of(record, random_x(record, dtype, (tokens,), seed=tokens), int8_activations=True)
        y = np.zeros((tokens, record.out_features), dtype)
        assert run(op, y) == y.shape
        # Above 16 tokens the product is one of floats; tests/ops holds the kernels to tighter bounds.
        assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" else 4e-3)


STACK = Case(bits=4, planes=1, in_features=96, group=48, bias=True, experts=5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("dtype", "rank", "tokens"), [("float32", 3, 7), ("float16", 0, 7), ("float16", 2, 60)])
def test_products_of_experts(dtype, rank, tokens, int8):
    op = STACK.draw(rank=rank, tokens=(tokens,), dtype=dtype, int8_activations=int8)
    y = np.zeros((tokens, op.record.out_features), dtype)
    assert run(op, y) == y.shape
    # x is rounded in its type; tests/ops holds the kernels to tighter bounds.
    assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" and not int8 else 4e-3)


@pytest.mark.parametrize(
    ("port", "shape", "message"),
    [
        (
            experts.NUMBERS,
            (6,),
            r"onShapeChange.*experts has shape \(6\); it must be \(7\), one number for each row of x",
        ),
        (experts.NUMBERS, (7, 1), r"configurePlugin.*x has shape \(7, 96\) and experts \(7, 1\); they must be"),
        ("params", (3, 2, 2, 2, 32), "input params is of 3 experts; it must be of as many as input codes has, 5"),
        ("codes", (5, 2, 2, 4, 32, 4), r"codes has shape \(2, 2, 4, 32, 4\); it must be \(2, 3, 4, 32, 4\)"),
    ],
)
def test_wrong_shapes_of_experts_are_refused(port, shape, message):
    op = STACK.draw(tokens=(7,))
    op.inputs[port] = np.zeros(shape, op.inputs[port].dtype)
    with pytest.raises(RuntimeError, match=message):
        run(op, np.zeros((7, 40), np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_look_ups(bits):
    op = Case(bits=bits, gather=True).draw()
    y = np.zeros((*op.x.shape, op.record.in_features), np.float32)
    assert run(op, y) == y.shape
    assert relative_error(y, op.expected()) < 1e-5


def test_scratch_for_many_tokens_is_asked_for():
    op = FORMS["branch"].draw(tokens=(8, 3))
    y = np.zeros((8, 3, op.record.out_features), np.float32)
    run(op, y)
    assert relative_error(y, op.expected()) < 1e-5


@pytest.mark.parametrize(
    ("port", "shape", "message"),
    [
        (
            "codes",
            (2, 2, 4, 32, 4),
            r"configurePlugin.*layer\.7: input codes has shape .* it must be \(2, 2, 3, 32, 4\)",
        ),
        ("levels", (2, 8), r"levels has shape \(2, 8\); it must be \(3, 8\)"),
        ("step", (2, 1, 2, 1), r"step has shape .* it must be \(2, 1, 3, 1\) beside params of shape \(2, 3, 3, 32\)"),
        ("bias", (39,), r"bias has shape \(39\); it must be \(40\) or \(1\)"),
        ("x", (2, 3, 47), r"x has shape \(2, 3, 47\); its last size must be in_features = 48"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_name_of_the_layer(port, shape, message):
    op = FORMS["bias"].draw()
    op.inputs[port] = np.zeros(shape, op.inputs[port].dtype)
    with pytest.raises(RuntimeError, match=message):
        run(op, np.zeros((2, 3, 40), np.float32))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_constants_must_belong_together(combination):
    """Those that are a layer give what the reference gives; others are refused before the builder tries them."""
    op = combination.op()
    y = np.zeros((3, 40), np.float32)
    if combination.legal:
        run(op, y)
        assert relative_error(y, op.expected()) < 1e-5
        return
    message = rf"configurePlugin.*layer\.7: input ({'|'.join(combination.parts)}) (has shape|is) .*it must be"
    with pytest.raises(RuntimeError, match=message):
        run(op, y)


def test_missing_attributes_are_refused():
    op = FORMS["plain"].draw()
    y = np.zeros((2, 3, 40), np.float32)
    with pytest.raises(RuntimeError, match=r"createPlugin: .*layer\.7: attribute offset is -1; it must be 0 or 1"):
        run(op, y, fields=2)
    with pytest.raises(RuntimeError, match="out_features is 0; it must be 1 to"):
        run(op, y, fields=1)


LIES = int(os.environ.get("RANKBOOK_LIES", "2000"))
"""For each operator; `make fuzz-native` tries more."""


@pytest.mark.parametrize("name", ["branch", "look-up", "experts"])
def test_fields_and_shapes_that_lie_are_refused_or_taken(name):
    """Attributes of a graph, fields that an engine stores, and shapes: no crash, and under sanitizers no fault."""
    cases = {"branch": FORMS["branch"], "look-up": Case(bits=4, gather=True), "experts": STACK}
    op = cases[name].draw(tokens=(7,))
    values = list(op.inputs.values())
    dims = (c.c_int64 * (8 * len(values)))()
    for i, value in enumerate(values):
        dims[8 * i : 8 * i + value.ndim] = list(value.shape)
    numbers = (c.c_int32 * 3)(*(op.attributes[key] for key in ("in_features", "out_features", "offset")))
    types = (c.c_int * len(values))(*(TRT_TYPES[str(value.dtype)] for value in values))
    ranks, taken = (c.c_int * len(values))(*(value.ndim for value in values)), (c.c_int * 3)()
    driver().rb_lies(op.op_type.encode(), numbers, len(values), ranks, dims, types, c.c_uint32(0), LIES, taken)
    assert LIES > taken[0] > taken[1] > taken[2] > LIES // 100, list(taken)


@pytest.mark.slow
@pytest.mark.skipif(bool(emulated.EXTRA_FLAGS), reason="this is the run under the sanitizers")
def test_the_plugin_is_clean_under_sanitizers():
    """All of the above once more: no access outside memory, no undefined behaviour, in host code and kernels alike."""
    compiler = emulated.compiler()
    assert compiler is not None
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    if not Path(runtime.stdout.strip()).is_file():
        pytest.skip("the compiler has no address sanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),  # Python itself is not built with it
        # Python never frees some of its memory; the fibers of the emulation are stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "RANKBOOK_EMULATION_FLAGS": "-fsanitize=address,undefined -fno-omit-frame-pointer -g1 -O0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "passed" in done.stdout
