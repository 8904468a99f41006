"""A gate becomes one node where nothing else uses what lies between."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from rankbook.exporter.passes.functions import AddBodies
from rankbook.exporter.passes.gates import FuseGates
from tests.exporter.passes.graphs import run

GATES = {
    "silu first": "a = Mul (gate, s) y = Mul (a, up)",
    "silu second": "a = Mul (s, gate) y = Mul (up, a)",
}
OTHERS = {
    "sigmoid of something else": "a = Mul (up, s) y = Mul (a, up)",
    "used twice": "a = Mul (gate, s) b = Mul (a, up) y = Add (a, b)",
    "no product": "a = Mul (gate, s) y = Add (a, up)",
}


def gate(body: str, dtype: str = "float") -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23]> g ({dtype}[2,4] gate, {dtype}[2,4] up) => ({dtype}[2,4] y)'
        f" {{ s = Sigmoid (gate) {body} }}"
    )


@pytest.mark.parametrize("order", GATES)
def test_either_order_is_one_node_with_the_same_result(order: str) -> None:
    generator = np.random.default_rng(0)
    feeds = {name: generator.standard_normal((2, 4)).astype(np.float32) for name in ("gate", "up")}
    want = run(gate(GATES[order]), feeds)
    model = gate(GATES[order])
    assert FuseGates()(model).modified
    assert [node.op_type for node in model.graph] == ["SwiGLU"]
    AddBodies()(model)
    np.testing.assert_allclose(run(model, feeds), want, rtol=1e-6)


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_anything_else_stays(body: str) -> None:
    assert not FuseGates()(gate(body)).modified


def test_other_types_stay() -> None:
    assert not FuseGates()(gate(GATES["silu first"], "float16")).modified
