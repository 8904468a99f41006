"""Which attention node the exporter writes, and what reads a file with it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from rankbook.exporter import conform
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
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
