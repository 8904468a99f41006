"""The native products of experts: what they refuse, and what `tests.ops.runners` does not vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from rankbook.plugins import library
from rankbook.plugins.experts import NUMBERS
from tests.ops.cases import Case, Op, relative_error
from tests.ops.runners import built, ort_session, run_in_process, run_native

pytestmark = built

CASE = Case(bits=4, out_features=70, in_features=96, group=48, rank=3, bias=True, experts=5, tokens=(40,))
NODE = "CodebookExpertsLowRank4 'layer'"


def check(op: Op, **entries: Any) -> None:
    """Compare with the reference; in the int8 mode with that of the operator that rounds, bit for bit."""
    rounded = entries.get("activations") == "int8"
    want = Op.of_experts(op.records, op.x, op.numbers, int8_activations=True) if rounded else op
    y = run_native(op, **entries)
    assert relative_error(y, want.expected()) < (1e-9 if rounded else 1e-5)


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("memory", ["huge", "mapped"])
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_threads_and_rounding_of_the_session(activations: str, memory: str, threads: int) -> None:
    check(CASE.draw(), activations=activations, memory=memory, threads=threads)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    run_in_process(f"{__name__}:check_widths", isa)


def check_widths() -> None:
    """Compare every width, in both modes."""
    for bits in (2, 3, 4, 8):
        for activations in ("fp32", "int8"):
            check(CASE.draw(bits=bits, planes=1), activations=activations)


def test_constants_that_are_cast_are_read_in_each_call() -> None:
    """Where ONNX Runtime does not fold its casts of fp16 constants, no constant is known before a call."""
    op = CASE.draw(dtype="float16", param_bits=16)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(str(library.library("ort")))
    session = ort.InferenceSession(op.model().SerializeToString(), options)
    (y,) = session.run(None, {"x": op.x, NUMBERS: op.numbers})
    assert relative_error(y, op.expected()) < 2.0**-10


def cut(name: str) -> Callable[[Op], None]:
    def change(op: Op) -> None:
        op.inputs[name] = op.inputs[name][:3]

    return change


def damage(op: Op) -> None:
    op.inputs["step"][4, 0, 0, 0, 0] = np.nan


def flatten(op: Op) -> None:
    op.inputs["bias"] = op.inputs["bias"][0]


def narrow(op: Op) -> None:
    op.inputs["up"] = op.inputs["up"][..., :2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut("params"), "input params is of 3 experts; it must be of as many as input codes has, 5"),
        (damage, "input step holds NaN or infinity"),
        (flatten, r"input bias has shape \(70\); it must have an axis of experts"),
        (narrow, r"input up has shape \(70, 2\); it must be \(70, 3\)"),
    ],
)
def test_constants_that_are_no_stack_are_refused(change: Callable[[Op], None], message: str) -> None:
    op = CASE.draw()
    change(op)
    with pytest.raises(Exception, match=f"{NODE}: {message}"):
        ort_session(op.model(), str(library.library("ort")))


@pytest.mark.parametrize(
    ("x", "numbers", "message"),
    [
        ((2, 96), [0, 5], r"the number of an expert lies outside \[0, 5\)"),
        ((2, 96), [-1, 0], r"the number of an expert lies outside \[0, 5\)"),
        ((2, 96), [0, 1, 2], r"experts has shape \(3\); it must be \(2\), one number for each row of x"),
        ((2, 64), [0, 1], r"x has shape \(2, 64\); it must be \(rows, in_features\) with in_features = 96"),
    ],
)
def test_calls_that_do_not_fit_are_refused(x: tuple[int, ...], numbers: list[int], message: str) -> None:
    model = CASE.draw().model()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "numbers"
    session = ort_session(model, str(library.library("ort")))
    with pytest.raises(Exception, match=f"{NODE}: {message}"):
        session.run(None, {"x": np.zeros(x, np.float32), NUMBERS: np.array(numbers)})


def test_numbers_of_another_type_are_refused() -> None:
    model = CASE.draw().model()
    model.graph.input[1].type.tensor_type.elem_type = 6
    with pytest.raises(Exception, match=f"{NODE}: input experts is int32; it must be int64"):
        ort_session(model, str(library.library("ort")))
