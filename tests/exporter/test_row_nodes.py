"""``export --graph ort`` writes one node for a residual sum with its norm, and one for a gate."""

from __future__ import annotations

import collections
from pathlib import Path

import onnx
import pytest

from rankbook.exporter import conform
from rankbook.exporter.export import ExportOptions, export
from rankbook.plugins import rows
from tests.exporter.checkpoints import make_checkpoint

OWN = (rows.ADD_NORM.name, rows.SWIGLU.name)


def kinds_of(folder: Path) -> collections.Counter[str]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return collections.Counter(node.op_type for node in nodes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of two blocks."""
    return make_checkpoint(tmp_path_factory.mktemp("rows"), "llama", model={"head_dim": 16}, bits=4)


def test_float32_has_the_row_operators(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", ExportOptions(graph="ort"))
    kinds = kinds_of(tmp_path / "onnx")
    assert [kinds[name] for name in OWN] == [4, 2]
    assert not kinds["Sigmoid"] + kinds["SkipSimplifiedLayerNormalization"]
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == OWN[0])
    del node.attribute[:]
    node.input.pop()
    problems = conform.check_proto(model)
    assert "attribute 'epsilon' is missing" in problems[0]
    assert "has 2 inputs and 2 outputs; the contract asks for a, b, scale and y, sum" in problems[1]


def test_float16_keeps_the_nodes_of_onnx_runtime(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", ExportOptions(graph="ort", dtype="fp16"))
    kinds = kinds_of(tmp_path / "onnx")
    assert [kinds[name] for name in OWN] == [0, 0]
    assert (kinds["SkipSimplifiedLayerNormalization"], kinds["Sigmoid"]) == (4, 2)


def test_the_standard_graph_has_neither(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", ExportOptions())
    kinds = kinds_of(tmp_path / "onnx")
    assert [kinds[name] for name in OWN] == [0, 0]
