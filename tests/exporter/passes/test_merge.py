"""``export --graph ort`` makes one node of query, key and value, and one of gate and up."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from rankbook.exporter import conform
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.passes.merge import MergeProducts
from rankbook.exporter.stored import ExportedFileError
from rankbook.plugins import contract
from rankbook.tools.runtimes.ort import OrtModel
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli, stdout_json

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 20))


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, ``standard`` and ``ort``."""
    work = tmp_path_factory.mktemp("merge")
    checkpoint = make_checkpoint(work, "llama", model={"head_dim": 16}, bits=4)
    for graph in ("standard", "ort"):
        export(checkpoint, work / graph, ExportOptions(logits="all", graph=graph))
    return work


def test_layers_of_one_input_are_one_node(folder: Path) -> None:
    kinds = collections.Counter(node.op_type for node in graph_of(folder / "ort").graph.node)
    layers = 2
    assert kinds["CodebookMatMul4Merged3"] == kinds["CodebookMatMul4Merged2"] == layers
    assert kinds["CodebookMatMul4Merged1"] == 2 * layers, "o_proj and down_proj"
    assert "CodebookMatMul4" not in kinds
    standard = {node.op_type for node in graph_of(folder / "standard").graph.node}
    assert not any("Merged" in name for name in standard), "the portable file has the operators of TensorRT's plugins"


def test_bodies_compute_what_single_nodes_compute(folder: Path) -> None:
    """Stock ONNX Runtime; both files differ in attention and normalization too (test_ort_graph.py says 1e-5)."""
    got, want = (OrtModel(folder / name).logits(TOKENS) for name in ("ort", "standard"))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_the_file_lists_every_layer(folder: Path) -> None:
    """Inspection and parity see layers, whatever node holds them."""
    merged, single = (ExportedModel.open(folder / name) for name in ("ort", "standard"))
    assert [node.name for node in merged.packed] == list(merged.outputs_of)
    assert {node.name: node.ports() for node in merged.packed}.keys() == {node.name for node in single.packed}
    for node in merged.packed:
        twin = next(other for other in single.packed if other.name == node.name)
        assert (node.op_type, node.attributes, node.inputs[1:]) == (twin.op_type, twin.attributes, twin.inputs[1:])
    assert merged.code_tensors == single.code_tensors


@pytest.mark.parametrize("kernels", ["bodies", "auto"])
def test_parity_checks_every_layer(kernels: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each product of a node alone against numpy, and in the file against its PyTorch module."""
    options = ("--checkpoint", folder / "checkpoint", "--every-node", "--kernels", kernels, "--json", "--quiet")
    assert run_cli("parity", folder / "ort", *options) == 0
    report = stdout_json(capsys)
    layers = len(ExportedModel.open(folder / "ort").packed)
    assert (len(report["operators"]), len(report["layers"])) == (layers, layers)


def test_a_damaged_node_is_reported(folder: Path, tmp_path: Path) -> None:
    model = graph_of(folder / "ort")
    node = next(node for node in model.graph.node if node.op_type == "CodebookMatMul4Merged2")
    node.name = "gate"
    assert any("has 1 names" in problem for problem in conform.check_proto(model))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ExportedFileError, match="'gate' has 1 names"):
        ExportedModel.open(tmp_path)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("levels_0", 3, "port 'levels' (model.layers.0.mlp.gate_proj.levels) must be an initializer"),
        ("codes_1", [0, 1 << 20, 2], "up_proj.codes ends at byte 2097152"),
        ("codes_1", [5], "attribute codes_1 is [5]; it must be a first byte and a shape"),
    ],
)
def test_a_damaged_constant_is_reported(folder: Path, attribute: str, value: object, message: str) -> None:
    model = graph_of(folder / "ort")
    node = next(node for node in model.graph.node if node.op_type == "CodebookMatMul4Merged2")
    kept = [item for item in node.attribute if item.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    assert any(message in problem for problem in conform.check_proto(model))


def test_what_differs_stays_alone(folder: Path) -> None:
    """Another width, another group size; the others are merged."""
    model = ir.load(folder / "standard" / "model.onnx")
    nodes = {str(node.name): node for node in model.graph}
    nodes["model.layers.0.self_attn.k_proj"].op_type = "CodebookMatMul8"
    params = nodes["model.layers.1.self_attn.v_proj"].inputs[3]
    assert params is not None
    assert params.shape is not None
    params.shape = ir.Shape([params.shape[0], 1, *params.shape.dims[2:]])
    MergeProducts()(model)
    names = {name for node in model.graph if "self_attn" in (name := str(node.name)) and node.domain == contract.DOMAIN}
    own = {node.op_type for node in model.graph if node.domain == contract.DOMAIN}
    first, second = (f"model.layers.{i}.self_attn" for i in range(2))
    assert {f"{first}.k_proj", f"{first}.q_proj {first}.v_proj"} <= names
    assert {f"{second}.v_proj", f"{second}.q_proj {second}.k_proj"} <= names
    assert {"CodebookMatMul8Merged1", "CodebookMatMul4Merged1", "CodebookMatMul4Merged2"} <= own


def test_constants_are_part_of_the_node(folder: Path) -> None:
    """A decode step pays for every initializer: of packed layers one a node is left."""
    graph = graph_of(folder / "ort").graph
    nodes = [node for node in graph.node if "Merged" in node.op_type]
    assert {node.input[1] for node in nodes} == {item.name for item in graph.initializer if item.name.endswith(".data")}
    assert not any(item.name.endswith((".codes", ".levels", ".step")) for item in graph.initializer)


@pytest.mark.parametrize("settings", [{"quantize_embeddings": 8, "quantize_lm_head": 8}, {"param_bits": 16}])
def test_what_cannot_be_part_of_a_node_stays(settings: dict[str, int], tmp_path: Path) -> None:
    """An output layer that shares its codes with the embedding; parameters that are not bytes."""
    tied = {"head_dim": 16, "tie_word_embeddings": True}
    checkpoint = make_checkpoint(tmp_path, "llama", model=tied, bits=4, **settings)
    export(checkpoint, tmp_path / "ort", ExportOptions(logits="all", graph="ort"))
    export(checkpoint, tmp_path / "standard", ExportOptions(logits="all"))
    kinds = {node.op_type for node in graph_of(tmp_path / "ort").graph.node}
    alone = "CodebookMatMul4" if "param_bits" in settings else "CodebookMatMul8"
    assert alone in kinds
    assert ("CodebookMatMul4Merged3" in kinds) == ("param_bits" not in settings)
    got, want = (OrtModel(tmp_path / name).logits(TOKENS) for name in ("ort", "standard"))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
