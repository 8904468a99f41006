"""Every family runs in stock ONNX Runtime with the logits of torch: prompt, then steps with a cache, with padding."""

from __future__ import annotations

import onnx
import pytest

from rankbook.calibration.model.loading import load_model
from rankbook.exporter.conform import check_model
from rankbook.exporter.export import ExportOptions, export
from tests.exporter.checkpoints import FAMILY_OPTIONS, make_checkpoint
from tests.exporter.compare import worst_error
from tests.tiny import FAMILIES

# float32 sums in another order, through two layers; 1e-6 is typical.
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_torch(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path, family, **FAMILY_OPTIONS[family])
    report = export(checkpoint, tmp_path / "out")
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE
    assert check_model(tmp_path / "out") == []
    operators = sum(count for name, count in report.nodes.items() if name.startswith("Codebook"))
    assert operators == report.layers
    assert_every_output_has_a_shape(tmp_path / "out" / "model.onnx")


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("opt", 4), ("gemma2", 8)])
def test_packed_embedding_and_head_are_operators_too(family, bits, tmp_path):
    tables = {"quantize_embeddings": bits, "quantize_lm_head": bits}
    checkpoint = make_checkpoint(tmp_path, family, bits=4, **tables)
    report = export(checkpoint, tmp_path / "out", ExportOptions(logits="all"))
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="all", rows=3) < TOLERANCE
    assert report.nodes[f"CodebookGather{bits}"] == 1
    names = {
        tensor.name for tensor in onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
    }
    head = next((name for name in names if name.startswith("lm_head.")), None)
    assert (head is None) == (family != "llama"), "tied layers share the codes of the embedding"


def assert_every_output_has_a_shape(path):
    graph = onnx.load(path, load_external_data=False).graph
    known = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in filter(None, node.output):
            assert known[name].elem_type, f"{name} has no type"
            assert known[name].HasField("shape"), f"{name} has no shape"
