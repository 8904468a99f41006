"""`check_model` accepts what the exporter writes and names what is wrong in a damaged file."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rankbook.exporter.conform import check_model, check_proto
from tests.calibration.records import random_record
from tests.ops.cases import FORMS, look_up_model, op_model


@pytest.mark.parametrize("case", FORMS)
def test_every_stored_form_conforms(case):
    record = FORMS[case].draw().record
    assert check_proto(op_model(record)) == []
    if record.low_rank is None:
        assert check_proto(look_up_model(record)) == []


def damaged(change):
    model = op_model(random_record(rank=5))
    change(model)
    return check_proto(model)


def replace(model, name, values):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def drop_attribute(model, name):
    node = model.graph.node[0]
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


CHANGES = {
    r"CodebookMatMulLowRank3.*'codes'.*uint8; allowed are int8": lambda m: replace(
        m, "codes", np.zeros((2, 2, 3, 32, 4), np.uint8)
    ),
    r"'codes'.*shape \(1, 2, 3, 32, 4\)": lambda m: replace(m, "codes", np.zeros((1, 2, 3, 32, 4), np.int8)),
    r"'levels'.*float32; allowed are float16": lambda m: replace(m, "levels", np.zeros((3, 8), np.float32)),
    r"'params'.*shape \(2, 3, 2, 32\)": lambda m: replace(m, "params", np.zeros((2, 3, 2, 32), np.int8)),
    r"'up'.*shape \(40, 4\)": lambda m: replace(m, "up", np.zeros((40, 4), np.int8)),
    r"'base'.*must be an initializer": lambda m: m.graph.initializer.remove(
        next(tensor for tensor in m.graph.initializer if tensor.name == "base")
    ),
    r"'out_features' is missing": lambda m: drop_attribute(m, "out_features"),
    r"'plugin_version' is missing": lambda m: drop_attribute(m, "plugin_version"),
    r"unknown attributes \['extra'\]": lambda m: m.graph.node[0].attribute.append(helper.make_attribute("extra", 1)),
    r"has 10 inputs": lambda m: m.graph.node[0].input.pop(),
    r"unknown operator": lambda m: setattr(m.graph.node[0], "op_type", "CodebookMatMul5"),
    r"no function for CodebookMatMulLowRank3": lambda m: m.functions.pop(0),
    r"imports version 7": lambda m: setattr(m.opset_import[1], "version", 7),
    r"'x'.*shape \(None, None, 47\); allowed are \(\.\.\., K\) with .*'K': 48": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 47
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_damage_is_named(message):
    problems = damaged(CHANGES[message])
    assert problems
    assert any(re.search(message, problem) for problem in problems), problems


def test_a_foreign_or_broken_file_is_named(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:])), tmp_path / "foreign.onnx")
    assert "not a file of rankbook" in check_model(tmp_path / "foreign.onnx")[0]
    (tmp_path / "broken.onnx").write_bytes(b"\x08\xff\xff garbage")
    assert len(check_model(tmp_path / "broken.onnx")) == 1
    assert "does not exist" in check_model(tmp_path / "missing.onnx")[0]


def test_missing_and_truncated_data_is_named(tmp_path):
    model = op_model(random_record())
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=64)
    assert check_model(tmp_path) == []
    data = (tmp_path / "weights").read_bytes()
    (tmp_path / "weights").write_bytes(data[:-1])
    assert "truncated" in check_model(tmp_path)[0]
    (tmp_path / "weights").unlink()
    assert "missing" in check_model(tmp_path)[0]
