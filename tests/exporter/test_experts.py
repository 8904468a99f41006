"""Products of experts: their body computes the reference in stock ONNX Runtime, and keeps every expert packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.loading import load_model
from rankbook.exporter.bodies import functions
from rankbook.exporter.conform import check_proto
from rankbook.exporter.dialects.base import DialectError
from rankbook.exporter.dialects.rankbook import attributes, initializers
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.functions import OPSET
from rankbook.exporter.stored import ExportedFileError
from rankbook.plugins import contract, experts, layout
from rankbook.plugins.operators import OPERATORS
from rankbook.tools.dev import family_models
from rankbook.tools.inspect.inspection import inspect
from tests.calibration.records import FORMS, random_record
from tests.exporter.compare import worst_error
from tests.ops.cases import EPSILON, relative_error
from tests.tiny import write_text

EXPERTS = 5
ROWS = np.array([3, 0, 3, 1, 3, 0, 4])
"""Experts of the rows: one with many rows, one with none, out of order."""


class Stack:
    """The product of random experts on random rows."""

    def __init__(self, *, int8: bool = False, dtype: str = "float32", **form: Any) -> None:
        records = [random_record(**form, seed=seed) for seed in range(EXPERTS)]
        spec = records[0].spec()
        packed = [record.pack() for record in records]
        kind = contract.matmul_kind(low_rank=bool(spec.branch_rank), int8_activations=int8)
        member = contract.PACKED[contract.op_name(kind, spec.bits)]
        self.operator = OPERATORS[experts.name_of(member)]
        tensors = initializers(
            spec, self.operator, lambda part: torch.stack([tensors[part] for tensors in packed]), "layer", EXPERTS
        )
        self.constants = {name: tensor.numpy() for name, tensor in tensors.items()}
        self.attributes: dict[str, Any] = {item.name: attributes(spec)[item.name] for item in self.operator.attributes}
        self.x = np.random.default_rng(0).standard_normal((len(ROWS), spec.in_features)).astype(dtype)
        self.member, self.records = member, records

    def expected(self) -> Any:
        return self.operator.compute([self.x, ROWS, *self.constants.values()], self.attributes)[0]

    def model(self) -> onnx.ModelProto:
        inputs = ["x", experts.NUMBERS, *self.constants]
        name, width = self.operator.name, self.attributes["out_features"]
        node = helper.make_node(name, inputs, ["y"], name="layer", domain=contract.DOMAIN, **self.attributes)
        kind = helper.np_dtype_to_tensor_dtype(self.x.dtype)
        x = helper.make_tensor_value_info("x", kind, ["rows", self.x.shape[1]])
        numbers = helper.make_tensor_value_info(experts.NUMBERS, TensorProto.INT64, ["rows"])
        y = helper.make_tensor_value_info("y", kind, ["rows", width])
        held = [numpy_helper.from_array(values, name) for name, values in self.constants.items()]
        graph = helper.make_graph([node], "op", [x, numbers], [y], held)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
        return helper.make_model(graph, opset_imports=opsets, functions=functions([name]), ir_version=11)

    def run(self, rows: Any = ROWS) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(self.model().SerializeToString(), options)
        return session.run(None, {"x": self.x[: len(rows)], experts.NUMBERS: rows})[0]


def test_the_reference_is_the_product_of_each_row_with_its_expert() -> None:
    stack = Stack(bits=3, rank=2, bias=True)
    want = [
        stack.x[row] @ stack.records[expert].weight(with_low_rank=True).numpy().T + stack.records[expert].bias.numpy()
        for row, expert in enumerate(ROWS)
    ]
    np.testing.assert_allclose(stack.expected(), np.stack(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("int8", [False, True])
def test_the_body_computes_the_reference(form: str, int8: bool) -> None:
    stack = Stack(int8=int8, **FORMS[form])
    assert check_proto(stack.model()) == []
    # Float32 sums in another order.
    assert relative_error(stack.run(), stack.expected()) < 2e-6


@pytest.mark.parametrize("bits", layout.BITS)
def test_one_row_and_none_work(bits: int) -> None:
    stack = Stack(bits=bits)
    assert relative_error(stack.run(ROWS[:1]), stack.expected()[:1]) < 2e-6
    assert stack.run(ROWS[:0]).shape == (0, 40)


def test_half_precision_keeps_its_type() -> None:
    stack = Stack(bits=4, dtype="float16")
    got = stack.run()
    assert got.dtype == np.float16
    assert relative_error(got, stack.expected()) < 8 * EPSILON["float16"]


def test_experts_stay_packed_in_the_optimized_graph(tmp_path) -> None:
    stack = Stack(out_features=64, in_features=256, bits=2, group=256, planes=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(stack.model().SerializeToString(), options)
    weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer)
    # Codes, and small tables; the matrices in float32 would be 328 kB.
    assert weights < EXPERTS * 64 * 256 * 2 / 8 + 20_000


def test_constants_of_different_numbers_of_experts_are_refused() -> None:
    stack = Stack(bits=4)
    stack.constants["params"] = stack.constants["params"][:3]
    assert any("params" in problem for problem in check_proto(stack.model()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    family_models.tiny("mixtral", folder / "model")
    text = str(write_text(folder / "text.txt"))
    how = QuantizeOptions(method="rtn", bits=4, group_size=32, calib=text, calib_sequences=2, calib_length=16)
    quantize_model(folder / "model", folder / "checkpoint", how)
    return folder / "checkpoint"


def test_a_file_with_experts_is_described_layer_by_layer_and_rounds_inside(checkpoint: Path, tmp_path: Path) -> None:
    report = export(checkpoint, tmp_path / "out", ExportOptions(logits="all", activations="int8"))
    assert report.nodes["CodebookExperts4A8"] == 4
    assert report.other_bytes < report.packed_bytes + 2 * 4 * family_models.VOCABULARY * 64
    file = ExportedModel.open(tmp_path / "out")
    file.verify()
    with pytest.raises(ExportedFileError, match="experts of a mixture"):
        file.require_standard()
    stored, exported = (inspect(folder).layers for folder in (checkpoint, tmp_path / "out"))
    assert {layer.name: layer.bits for layer in exported} == {layer.name: layer.bits for layer in stored}
    model, _ = load_model(checkpoint)
    # Inputs are rounded to 8 bits.
    assert worst_error(tmp_path / "out", model, logits="all") < 0.05


@pytest.mark.parametrize("dialect", ["qdq", "ort"])
def test_other_dialects_refuse_experts(dialect: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DialectError, match="no operator for the experts of a mixture; export in the dialect rankbook"):
        export(checkpoint, tmp_path / "out", ExportOptions(dialect=dialect))
