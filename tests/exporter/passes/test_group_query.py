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


def kept(model: ir.Model, windows: list[int]) -> dict[str, str]:
    """Return why layers keep the standard attention, which then is what it was."""
    fuse = GroupQueryAttention(None, windows)
    assert not fuse(model).modified
    assert {node.op_type for node in model.graph} == {"Concat", "Attention"}
    return fuse.kept


def test_masks_that_are_no_windows_keep_the_standard_attention() -> None:
    """Two layers with one mask, of which the configuration says that one has a window, or none that is known."""
    layers = " ".join(
        f"both{i} = Concat <axis = 2> (past{i}, k) y{i} = Attention (q, both{i}, both{i}, seen)" for i in (0, 1)
    )
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,2,s,16] q, float[b,2,s,16] k, bool[b,1,s,t] seen,'
        f" float[b,2,p,16] past0, float[b,2,p,16] past1) => (float[b,2,s,16] y0, float[b,2,s,16] y1) {{ {layers} }}"
    )
    for index, value in enumerate(model.graph.inputs[3:]):
        value.name = f"past_key_values.{index}.key"
    why = "its result is not brought into rows"
    assert kept(model, [8, -1]) == {"0": why, "1": why}
    assert kept(model, [0, -1]) == {"0": "which keys a token sees is no window", "1": why}
    for number in (0, 1):
        swap = ir.node("Transpose", [model.graph[2 * number + 1].outputs[0]], {"perm": [0, 2, 1, 3]})
        model.graph.extend([swap, ir.node("Reshape", [swap.outputs[0], None])])
    fuse = GroupQueryAttention(None, [8, -1])
    assert not fuse(model).modified
    assert fuse.kept["1"] == "its mask is not known: 1 masks for windows of -1, 8 positions (-1 is all)"


def test_heads_of_another_size_keep_the_standard_attention() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,2,s,12] q, float[b,2,p,12] past, float[b,2,s,12] k)'
        " => (float[b,2,s,12] y) { both = Concat <axis = 2> (past, k) y = Attention (q, both, both) }"
    )
    model.graph.inputs[1].name = "past_key_values.0.key"
    assert kept(model, [-1]) == {"0": "heads of 12 elements, no multiple of 8"}


def test_a_cache_that_two_attentions_read_keeps_them() -> None:
    layers = "both = Concat <axis = 2> (past, k) y = Attention (q, both, both) z = Attention (y, both, both)"
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[b,2,s,16] q, float[b,2,p,16] past, float[b,2,s,16] k)'
        f" => (float[b,2,s,16] z) {{ {layers} }}"
    )
    model.graph.inputs[1].name = "past_key_values.0.key"
    assert kept(model, [-1]) == {"0": "2 attentions read its cache"}


def test_a_graph_without_attention_stays() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    )
    assert not GroupQueryAttention(None, [])(model).modified
