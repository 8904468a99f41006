"""Products of experts: their body computes the reference in stock ONNX Runtime, and keeps every expert packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.loading import load_model
from rankbook.exporter.conform import check_proto
from rankbook.exporter.dialects.base import DialectError
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.tools.deploy.checks import has_plugin
from rankbook.tools.dev import family_models
from rankbook.tools.inspect.inspection import inspect
from tests.exporter.compare import worst_error
from tests.ops.cases import Case
from tests.tiny import write_text

STACK = Case(bits=4, experts=5, tokens=(7,))


def test_the_reference_is_the_product_of_each_row_with_its_expert() -> None:
    op = STACK.draw(bits=3, rank=2, bias=True)
    want = []
    for row, expert in zip(op.x, op.numbers, strict=True):
        record = op.records[expert]
        assert record.bias is not None
        want.append(row @ record.weight(with_low_rank=True).numpy().T + record.bias.numpy())
    np.testing.assert_allclose(op.expected(), np.stack(want), rtol=1e-4, atol=1e-4)


def test_experts_stay_packed_in_the_optimized_graph(tmp_path: Path) -> None:
    op = STACK.draw(out_features=64, in_features=256, bits=2, group=256, planes=1)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(op.model(bodies=True).SerializeToString(), options)
    weights = sum(tensor.ByteSize() for tensor in onnx.load(tmp_path / "optimized.onnx").graph.initializer)
    # Codes, and small tables; the matrices in float32 would be 328 kB.
    assert weights < 5 * 64 * 256 * 2 / 8 + 20_000


def test_constants_of_different_numbers_of_experts_are_refused() -> None:
    op = STACK.draw()
    assert check_proto(op.model(bodies=True)) == []
    op.inputs["params"] = op.inputs["params"][:3]
    assert any("params" in problem for problem in check_proto(op.model(bodies=True)))


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
    file.require_standard()
    stored, exported = (inspect(folder).layers for folder in (checkpoint, tmp_path / "out"))
    assert {layer.name: layer.bits for layer in exported} == {layer.name: layer.bits for layer in stored}
    model, _ = load_model(checkpoint)
    # Inputs are rounded to 8 bits.
    assert worst_error(tmp_path / "out", model, logits="all") < 0.05


def test_a_file_of_before_there_were_plugins_for_experts_is_read_and_built_without(
    checkpoint: Path, tmp_path: Path
) -> None:
    export(checkpoint, tmp_path / "out", ExportOptions())
    assert all(map(has_plugin, ExportedModel.open(tmp_path / "out").packed))
    path = tmp_path / "out" / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type.startswith("CodebookExperts"):
            kept = [item for item in node.attribute if not item.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(kept)
    onnx.save(proto, path)
    assert check_proto(proto) == []
    without = [node.op_type for node in ExportedModel.open(tmp_path / "out").packed if not has_plugin(node)]
    assert without == ["CodebookExperts4"] * 4


@pytest.mark.parametrize("dialect", ["qdq", "ort"])
def test_other_dialects_refuse_experts(dialect: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DialectError, match="no operator for the experts of a mixture; export in the dialect rankbook"):
        export(checkpoint, tmp_path / "out", ExportOptions(dialect=dialect))
