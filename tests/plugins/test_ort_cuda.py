"""ONNX Runtime's operators on a GPU, as far as a machine without one can show it.

ONNX Runtime itself runs them over emulated kernels (`emulation/`), in a session of the CPU. The built library loads
without a driver, serves the CPU as the other one does, and registers an operator for the CUDA provider beside each.
"""

from __future__ import annotations

import ctypes as c
import re
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from rankbook.plugins import contract, experts, library, merged
from rankbook.tools.errors import MissingError
from rankbook.tools.runtimes import ort as backend
from rankbook.tools.runtimes import runtimes, trt
from tests.ops.cases import FORMS, WIDE, Case, relative_error
from tests.plugins import emulated
from tests.plugins.form_cases import COMBINATIONS, Combination
from tests.plugins.merged_ops import draw_several, model_of
from tests.plugins.toolchain import EXPECTED, ort_headers, output, required_tool

FLOATS = ("1", "10", "16")
"""float32, float16 and bfloat16 in ONNX."""
built = pytest.mark.skipif(
    library.unavailable("ort-cuda") is not None and not EXPECTED, reason=str(library.unavailable("ort-cuda"))
)


emulates = pytest.mark.skipif(
    emulated.compiler() is None or ort_headers() is None,
    reason="building the emulated operators needs a C++ compiler and ONNX Runtime's headers (`make native` gets them)",
)


@cache
def driver() -> Path:
    """Build the operators over the emulation."""
    headers = ort_headers()
    assert headers is not None
    shims = ["shims/ort_cuda/cuda_ops.cpp", "shims/ort/constants.cpp", "shims/ort/huge_pages.cpp"]
    sources = [*emulated.SOURCES, *shims, "shims/view.cpp"]
    sources.append(str(Path(__file__).with_name("ort_cuda_driver.cpp")))
    return emulated.build("rankbook_ort_cuda_emulated", sources, [headers, emulated.CSRC / "emulation" / "include"])


def run(path: Path, model: Any, x: Any, providers: tuple[str, ...] = ("CPUExecutionProvider",), **others: Any) -> Any:
    """Run a model of one operator with a library; ``others`` are inputs behind x."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(path))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=list(providers))
    (y,) = session.run(None, {session.get_inputs()[0].name: x, **others})
    return y


@emulates
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", list(FORMS))
def test_products(case: str, dtype: str) -> None:
    op = FORMS[case].draw(dtype=dtype)
    y = run(driver(), op.model(bodies=True), op.x)
    # fp16: weights are rounded to 11 bits of mantissa. tests/ops holds the kernels to tighter bounds.
    assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" else 4e-3)


@emulates
@pytest.mark.parametrize("rank", [0, 5])
def test_products_of_rounded_activations(rank: int) -> None:
    sizes: dict[str, Any] = {"bits": 4, "in_features": 128, "group": 64, "tokens": (3,)}
    op = Case(**sizes, rank=rank, bias=True, int8_activations=True).draw()
    # The sums of groups are exact; they are added up in fp32 in another order.
    assert relative_error(run(driver(), op.model(), op.x), op.expected()) < 1e-5


@emulates
@pytest.mark.parametrize(("dtype", "rank", "tokens"), [("float32", 3, 7), ("float16", 0, 60)])
@pytest.mark.parametrize("int8", [False, True])
def test_products_of_experts(dtype: str, rank: int, tokens: int, int8: bool) -> None:
    op = replace(WIDE, dtype=dtype, rank=rank, experts=5).draw(tokens=(tokens,), int8_activations=int8)
    y = run(driver(), op.model(), op.x, experts=op.numbers)
    # x is rounded in its type; tests/ops holds the kernels to tighter bounds.
    assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" and not int8 else 4e-3)


@emulates
def test_numbers_of_experts_that_do_not_fit_x_are_refused() -> None:
    op = replace(WIDE, experts=5).draw(tokens=(7,))
    model = op.model()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "others"
    with pytest.raises(Exception, match=r"'layer': experts has shape \(6\) beside 2 axes of x"):
        run(driver(), model, op.x, experts=op.numbers[:6])


@emulates
@pytest.mark.parametrize("rank", [0, 5])
def test_several_products_of_one_input(rank: int) -> None:
    """Every product is what it is alone, bit for bit: kernels run one after another, each with its own scratch."""
    import onnxruntime as ort

    ops = draw_several(replace(WIDE, rank=rank, tokens=(20,), bias=True), 3)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(driver()))
    session = ort.InferenceSession(model_of(ops).SerializeToString(), options, providers=["CPUExecutionProvider"])
    for y, op in zip(session.run(None, {"x": ops[0].inputs["x"]}), ops, strict=True):
        np.testing.assert_array_equal(y, run(driver(), op.model(), op.inputs["x"]))


@emulates
def test_scratch_for_many_tokens_comes_from_the_runtime() -> None:
    op = FORMS["branch"].draw(tokens=(8, 3))
    assert relative_error(run(driver(), op.model(), op.x), op.expected()) < 1e-5


@emulates
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_look_ups(bits: int) -> None:
    op = Case(bits=bits, gather=True).draw()
    assert relative_error(run(driver(), op.model(), op.x), op.expected()) < 1e-5


@emulates
@pytest.mark.parametrize(
    ("constant", "shape", "message"),
    [
        ("codes", (1, 2, 3, 32, 4), r"codes has shape \(1, 2, 3, 32, 4\); it must be \(2, 2, 3, 32, 4\)"),
        ("levels", (2, 8), r"levels has shape \(2, 8\); it must be \(3, 8\)"),
        ("bias", (39,), r"bias has shape \(39\); it must be \(40\) or \(1\)"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_name_of_the_node(
    constant: str, shape: tuple[int, ...], message: str
) -> None:
    op = FORMS["bias"].draw()
    model = op.model(bodies=True)
    tensor = next(t for t in model.graph.initializer if t.name == constant)
    values = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, constant))
    with pytest.raises(Exception, match=message):
        run(driver(), model, op.x)


@emulates
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_constants_must_belong_together(combination: Combination) -> None:
    """Those that are a layer give what the reference gives; the kernels never see the others."""
    op = combination.op()
    if combination.legal:
        assert relative_error(run(driver(), op.model(), op.x), op.expected()) < 1e-5
        return
    with pytest.raises(Exception, match=rf"'layer': input ({'|'.join(combination.parts)}) (has shape|is) .*it must be"):
        run(driver(), op.model(), op.x)


@emulates
def test_a_wrong_input_is_refused() -> None:
    op = FORMS["bias"].draw()
    model = op.model(bodies=True)
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    with pytest.raises(Exception, match=r"x has shape \(2, 3, 47\); its last size must be in_features = 48"):
        run(driver(), model, op.x[..., :47])


# ------------------------------------------------------------------------------------------------ the built library


@built
@emulates
def test_an_operator_for_the_gpu_is_registered_beside_each_of_the_cpu(tmp_path: Path) -> None:
    # A copy: the library keeps what it has registered, and this runtime is none that a session could use.
    copy = str(shutil.copy(library.library("ort-cuda"), tmp_path))
    list_operators = c.CDLL(str(driver())).rb_operators
    list_operators.restype = c.c_char_p
    lines = Counter(list_operators(copy.encode()).decode().splitlines())
    on_gpu = {tuple(line.split()[::2]): n for line, n in lines.items() if line.split()[1] == "CUDAExecutionProvider"}
    wanted = [
        (name, type_)
        for name in (*contract.PACKED, *(each.name for each in (*merged.OPERATORS, *experts.OPERATORS)))
        for type_ in (FLOATS[:1] if name.startswith("CodebookGather") else FLOATS)
    ]
    assert sorted(on_gpu) == sorted(wanted)
    assert set(on_gpu.values()) == {4}  # one domain per configuration of the session
    assert all(f"{name} CPU {type_}" in lines for name, type_ in wanted)


@built
def test_it_links_no_cuda_and_exports_what_the_other_one_does() -> None:
    path = library.library("ort-cuda")
    needed = re.findall(r"NEEDED.*\[(.*)\]", output(required_tool("readelf"), "-d", path))
    assert not [name for name in needed if name.startswith(("libnv", "libcuda", "libstdc++"))]
    symbols = [line.split()[-1] for line in output(required_tool("nm"), "-D", "--defined-only", path).splitlines()]
    interface = [f"rankbook_cuda_{name}" for name in ("gather", "matmul", "size", "workspace")]
    interface += [f"rankbook_groups_{name}" for name in ("feedback", "moments", "round", "step")]
    assert sorted(symbols) == ["RegisterCustomOps", *interface, "rankbook_native_info"]


@built
@pytest.mark.parametrize("case", ["plain", "4 bits, branch, bias"])
def test_on_the_cpu_it_does_what_the_other_library_does(case: str) -> None:
    op = FORMS[case].draw()
    results = [run(library.library(name), op.model(), op.x) for name in ("ort-cuda", "ort")]
    np.testing.assert_array_equal(*results)


@built
@pytest.mark.skipif(trt.has_gpu(), reason="there is a GPU")
def test_it_says_why_there_is_no_gpu() -> None:
    assert library.native_info("ort")["cuda"] == "not built"
    assert "driver" in str(library.native_info("ort-cuda")["cuda"])
    assert backend.cuda_unavailable()
    with pytest.raises(MissingError, match=r"CUDA|driver"):
        runtimes()["native-cuda"].require()


@pytest.mark.gpu
@pytest.mark.skipif(backend.cuda_unavailable() is not None, reason=str(backend.cuda_unavailable()))
@pytest.mark.parametrize("rank", [0, 5])
def test_several_products_on_the_gpu(rank: int) -> None:
    """Small constants are attributes, which the operator brings to the GPU itself."""
    import onnxruntime as ort

    ops = draw_several(replace(WIDE, rank=rank, tokens=(20,), bias=True), 3)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library.library("ort-cuda")))
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = ort.InferenceSession(model_of(ops).SerializeToString(), options, providers=providers)
    for y, op in zip(session.run(None, {"x": ops[0].inputs["x"]}), ops, strict=True):
        assert relative_error(y, op.expected()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(backend.cuda_unavailable() is not None, reason=str(backend.cuda_unavailable()))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", list(FORMS))
def test_products_on_the_gpu(case: str, dtype: str) -> None:
    op = FORMS[case].draw(dtype=dtype)
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    y = run(library.library("ort-cuda"), op.model(), op.x, providers)
    assert relative_error(y, op.expected()) < (1e-5 if dtype == "float32" else 4e-3)
