"""The graph of experts for engines without a plugin computes the same, and TensorRT-RTX builds it packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from rankbook.exporter.bodies import experts_engine
from rankbook.exporter.engine_graph import with_engine_bodies
from rankbook.exporter.file import ExportedModel
from rankbook.plugins import contract
from rankbook.plugins.experts import NUMBERS
from tests.exporter import rtx
from tests.ops.cases import EPSILON, FORMS, Case, Op, relative_error
from tests.ops.runners import ort_session, run_session

BASE = Case(bits=4, experts=5, tokens=(7,))
CASES = {
    **{name: replace(case, experts=5, tokens=(7,)) for name, case in FORMS.items()},
    "int8": replace(BASE, int8_activations=True, in_features=96, group=48, rank=4, bias=True),
    "factors of no whole words": replace(BASE, out_features=33, in_features=50, group=50, rank=3),
    "one row": replace(BASE, tokens=(1,)),
}


def graph_of(op: Op, folder: Path) -> onnx.ModelProto:
    onnx.save(op.model(bodies=True), folder / "model.onnx")
    return with_engine_bodies(ExportedModel.examine(folder / "model.onnx"))


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_reference(name: str, tmp_path: Path) -> None:
    op = CASES[name].draw()
    proto = graph_of(op, tmp_path)
    onnx.checker.check_model(proto, full_check=True)
    assert relative_error(run_session(ort_session(proto), op), op.expected()) < 2e-6


def test_half_precision_and_every_byte(tmp_path: Path) -> None:
    op = replace(BASE, dtype="float16", bits=8, planes=1, linear_levels=True, in_features=512, group=64).draw()
    y = run_session(ort_session(graph_of(op, tmp_path)), op)
    assert relative_error(y, op.expected()) < 8 * EPSILON["float16"]


def test_data_files_stay_and_nodes_without_experts_too(tmp_path: Path) -> None:
    op = BASE.draw()
    proto = op.model(bodies=True)
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    changed = with_engine_bodies(ExportedModel.open(tmp_path / "model.onnx"))
    first, second = (
        {tensor.name: [(item.key, item.value) for item in tensor.external_data] for tensor in graph.initializer}
        for graph in (onnx.load(tmp_path / "model.onnx", load_external_data=False).graph, changed.graph)
    )
    assert first == second
    other = replace(BASE, experts=0).draw()
    assert graph_of(other, tmp_path).graph == other.model(bodies=True).graph


def test_another_operator_is_refused() -> None:
    with pytest.raises(ValueError, match="CodebookMatMul4 has no experts"):
        experts_engine.functions(contract.PACKED["CodebookMatMul4"], [])


@rtx.needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("int8", [False, True])
def test_it_builds_and_stays_packed(int8: bool, tmp_path: Path) -> None:
    op = replace(
        BASE, out_features=256, in_features=512, group=64, rank=4, bias=True, experts=8, int8_activations=int8
    ).draw()
    onnx.save(graph_of(op, tmp_path), tmp_path / "engine.onnx")
    report = rtx.build(tmp_path / "engine.onnx", {"x": ([1, 512], [8, 512], [64, 512]), NUMBERS: ([1], [8], [64])})
    assert report["errors"] == []
    stored = sum(value.nbytes for value in op.constants().values())
    assert stored / 2 < report["weight_bytes"] < 1.1 * stored + 50_000
