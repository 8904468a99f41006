"""A normalization has one type."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from rankbook.exporter.passes.norms import UnifyNormTypes
from tests.exporter.passes.graphs import run


def test_a_norm_is_computed_in_the_type_of_its_scale():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float16[b,8] x, float[8] w) => (float[b,8] y) { y = RMSNormalization <axis: int = -1> (x, w) }
    """)
    assert UnifyNormTypes()(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float16)
    wide = x.astype(np.float32)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert np.abs(run(model, {"x": x, "w": np.ones(8, np.float32)}) - want).max() < 1e-5
    assert not UnifyNormTypes()(model).modified
