"""A file has the body of each operator once."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from rankbook.exporter.passes.functions import AddBodies
from rankbook.exporter.passes.shapes import InferShapes
from tests.calibration.records import random_record
from tests.ops.cases import op_model


def test_bodies_are_added_once_and_shapes_reach_every_output():
    model = ir.from_proto(op_model(random_record(rank=2)))
    model.functions.clear()
    AddBodies()(model)
    AddBodies()(model)
    assert sorted(name for _, name, _ in model.functions) == ["CodebookMatMulLowRank3", "RankbookDequantize"]
    InferShapes()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
