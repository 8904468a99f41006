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
