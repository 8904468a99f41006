"""Which attention node the exporter writes, what reads a file with it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from rankbook.exporter import conform
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.passes.group_query import GroupQueryAttention
from rankbook.exporter.stored import ExportedFileError
from rankbook.plugins import attention
from rankbook.tools.inspect import inspection
from tests.exporter.checkpoints import make_checkpoint


def domains(folder: Path) -> set[str]:
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    return {node.domain for node in nodes if node.op_type == attention.NAME}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``checkpoint`` of a tiny OPT, whose file has no other operator of ONNX Runtime's."""
    folder = tmp_path_factory.mktemp("opt")
    checkpoint = make_checkpoint(folder, "opt", model={"hidden_size": 64}, bits=4)
    export(checkpoint, folder / "onnx", ExportOptions(logits="all", graph="ort"))
    return folder


@pytest.mark.parametrize(("dtype", "domain"), [("fp32", "rankbook"), ("fp16", "com.microsoft")])
def test_other_types_keep_the_node_of_onnx_runtime(dtype: str, domain: str, work: Path, tmp_path: Path) -> None:
    """rankbook's is for float32; ONNX Runtime refuses a custom operator of another type, and takes no body."""
    export(work / "checkpoint", tmp_path / "onnx", ExportOptions(graph="ort", dtype=dtype))
    assert domains(tmp_path / "onnx") == {domain}


def test_it_is_no_packed_layer(work: Path) -> None:
    """Commands that list layers do not see it, and TensorRT is not asked to build its body."""
    file = ExportedModel.open(work / "onnx")
    assert {node.op_type for node in file.packed} == {"CodebookMatMul4"}
    assert len(inspection.inspect(work / "onnx").layers) == len(file.packed)
    with pytest.raises(ExportedFileError, match=r"com\.microsoft.*--graph standard"):
        file.require_standard()


def test_a_node_that_breaks_the_contract_is_named(work: Path) -> None:
    model = onnx.load(work / "onnx" / "model.onnx", load_external_data=False)
    assert not conform.check_proto(model)
    first, second = [node for node in model.graph.node if node.op_type == attention.NAME]
    del first.attribute[0]
    second.attribute[0].i = 0
    second.input.pop()
    problems = conform.check_proto(model)
    assert len(problems) == 3
    assert "attribute 'num_heads' is missing" in problems[0]
    assert "attribute 'num_heads' is 0; it must be an integer in [1, 2147483647]" in problems[1]
    assert "has 6 inputs" in problems[2]


def test_masks_that_are_no_windows_are_refused() -> None:
    """Two layers with one mask, of which the configuration says that one has a window."""
    layers = " ".join(
        f"both{i} = Concat <axis = 2> (past{i}, k) y{i} = Attention (q, both{i}, both{i}, seen)" for i in (0, 1)
    )
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,2,s,16] q, float[b,2,s,16] k, bool[b,1,s,t] seen,'
        f" float[b,2,p,16] past0, float[b,2,p,16] past1) => (float[b,2,s,16] y0, float[b,2,s,16] y1) {{ {layers} }}"
    )
    for index, value in enumerate(model.graph.inputs[3:]):
        value.name = f"past_key_values.{index}.key"
    with pytest.raises(ValueError, match=r"1 masks and windows of -1, 8 positions.*graph standard"):
        GroupQueryAttention(None, [8, -1])(model)
    model.graph.inputs[4].name = "other"
    model.graph.inputs[3].name = "past_key_values.0.key"
    with pytest.raises(ValueError, match="2 of 1 layers"):
        GroupQueryAttention(None, [-1, -1])(model)


def test_heads_of_another_size_are_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,2,s,12] q, float[b,2,p,12] past, float[b,2,s,12] k)'
        " => (float[b,2,s,12] y) { both = Concat <axis = 2> (past, k) y = Attention (q, both, both) }"
    )
    model.graph.inputs[1].name = "past_key_values.0.key"
    with pytest.raises(ValueError, match="multiple of 8 numbers, and these have 12"):
        GroupQueryAttention(None, [-1])(model)


def test_a_graph_without_attention_stays() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    assert not GroupQueryAttention(None, [])(model).modified
