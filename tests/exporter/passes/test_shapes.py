"""No value is left without a shape."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rankbook.exporter.passes.shapes import InferShapes


def test_a_value_without_a_shape_is_named():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23, "other" : 1]>
        g (float[2] x) => (float[2] y) { h = other.Unknown (x)  y = Relu (h) }
    """)
    with pytest.raises(ValueError, match=r"Unknown node.*'h'"):
        InferShapes()(model)


def test_shapes_that_contradict_each_other_are_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[2,3] x, float[4,5] w) => (float[2,5] y) { h = MatMul (x, w)  y = Relu (h) }
    """)
    model.graph.node(0).name = "layers.0.o_proj"
    with pytest.raises(ValueError, match=r"contradict each other: .*layers\.0\.o_proj"):
        InferShapes()(model)
    assert not caplog.records, "no traceback beside it"
