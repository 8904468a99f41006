"""Gathers of all parts of a value become one Split."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rankbook.exporter.passes.selects import SplitSelects
from tests.exporter.passes.graphs import run

GRAPH = """
    <ir_version: 11, opset_import: ["" : 23]>
    g (float[b,2,3,4] x) => (float[b,2,4] y)
    <int64 first = {0}, int64 second = {1}, int64 third = {-1}, int64[1] list = {1}> {
        v = Gather <axis: int = 2> (x, third)
        q = Gather <axis: int = 2> (x, first)
        k = Gather <axis: int = AXIS> (x, second)
        part = Mul (q, k)
        y = Sub (part, v)
    }
"""


def test_parts_are_split_wherever_they_are_taken() -> None:
    model = ir.from_onnx_text(GRAPH.replace("AXIS", "-2"))
    x = np.random.default_rng(0).standard_normal((5, 2, 3, 4)).astype(np.float32)
    want = run(model, {"x": x})
    assert SplitSelects()(model).modified
    assert [node.op_type for node in model.graph] == ["Split", "Squeeze", "Squeeze", "Squeeze", "Mul", "Sub"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_array_equal(run(model, {"x": x}), want)
    assert not SplitSelects()(model).modified


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("third = {-1}", "third = {1}"),  # one part is not taken
        ("k = Gather <axis: int = AXIS> (x, second)", "all = Gather <axis: int = 2> (x, list) k = Squeeze (all, axes)"),
        ("float[b,2,3,4] x", "float[b,2,p,4] x"),  # who knows how many there are
    ],
)
def test_other_gathers_stay(before: str, after: str) -> None:
    text = GRAPH.replace("int64[1] list", "int64[1] axes = {2}, int64[1] list").replace(before, after)
    model = ir.from_onnx_text(text.replace("AXIS", "2"))
    assert not SplitSelects()(model).modified
