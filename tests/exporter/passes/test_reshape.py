"""Reshapes get constant targets."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rankbook.exporter.passes.reshape import StaticReshape
from tests.exporter.passes.graphs import run


def test_reshapes_get_a_constant_target_where_axes_allow_it():
    model = ir.from_onnx_text("""
        <ir_version: 11, opset_import: ["" : 23]>
        g (float[b,s,8] x, int64[4] t, int64[2] u) => (float[b,s,2,4] y, float[r,2] z) {
            y = Reshape <allowzero: int = 1> (x, t)
            z = Reshape (x, u)
        }
    """)
    assert StaticReshape()(model).modified
    targets = {node.outputs[0].name: node.inputs[1].const_value for node in model.graph}  # type: ignore[union-attr]
    assert targets["y"] is not None
    assert targets["y"].numpy().tolist() == [0, 0, 2, 4]
    assert targets["z"] is not None
    assert targets["z"].numpy().tolist() == [-1, 2]
    x = np.arange(48, dtype=np.float32).reshape(2, 3, 8)
    feeds = {"x": x, "t": np.array([2, 3, 2, 4]), "u": np.array([24, 2])}
    assert np.array_equal(run(model, feeds), x.reshape(2, 3, 2, 4))
