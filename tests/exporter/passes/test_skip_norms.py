"""A sum and its normalization become one node with both results."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from rankbook.exporter.passes.skip_norms import FuseSkipNorms


@pytest.mark.parametrize(
    ("dtype", "kind", "outputs"),
    [
        ("float", ("rankbook", "AddRMSNormalization"), ["z", "sum"]),
        ("float16", ("com.microsoft", "SkipSimplifiedLayerNormalization"), ["z", "", "", "sum"]),
    ],
)
def test_both_results_keep_their_names(dtype: str, kind: tuple[str, str], outputs: list[str]) -> None:
    model = ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23]> g ({dtype}[b,s,4] x, {dtype}[b,s,4] y)'
        f" => ({dtype}[b,s,4] z, {dtype}[b,s,4] sum) <{dtype}[4] w = {{1, 1, 1, 1}}>"
        " { sum = Add (x, y) z = RMSNormalization <epsilon = 0.1> (sum, w) }"
    )
    model.graph.outputs[1].shape = model.graph.inputs[0].shape
    assert FuseSkipNorms()(model).modified
    (node,) = model.graph
    assert (node.domain, node.op_type) == kind
    assert [value.name for value in node.outputs] == outputs
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.1)


def test_a_sum_that_is_broadcast_stays() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,4] x, float[4] y) => (float[b,s,4] z)'
        " <float[4] w = {1, 1, 1, 1}> { sum = Add (x, y) z = RMSNormalization <epsilon = 0.1> (sum, w) }"
    )
    assert not FuseSkipNorms()(model).modified
