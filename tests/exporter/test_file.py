"""An exported file is opened once; what is wrong with it is one sentence of a declared error."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from rankbook.exporter import conform
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.properties import Metadata
from rankbook.exporter.stored import ExportedFileError
from rankbook.tools.errors import UsageError
from rankbook.tools.inspect.inspection import inspect
from tests.exporter.checkpoints import make_checkpoint

DATA = "model.onnx.data"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with merged products, attention and rows of this project."""
    work = tmp_path_factory.mktemp("file")
    checkpoint = make_checkpoint(work, "llama", model={"head_dim": 16}, bits=4, error_branch="lqer", error_rank=2)
    export(checkpoint, work / "onnx", ExportOptions(graph="ort"))
    return work / "onnx"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def change(folder: Path, damage: Callable[[onnx.ModelProto], object]) -> Path:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    damage(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == tensor.EXTERNAL)


def set_entry(key: str, value: str) -> Callable[[onnx.ModelProto], object]:
    def damage(model: onnx.ModelProto) -> None:
        next(item for item in first_external(model).external_data if item.key == key).value = value

    return damage


def test_constants_of_products_are_views_of_the_data_file(exported: Path) -> None:
    model = ExportedModel.open(exported)
    data = (exported / DATA).read_bytes()
    parts = [tensor for node in model.packed for tensor in node.constants.values() if tensor.part is not None]
    assert len({id(tensor.stored) for tensor in parts}) < len(parts)
    for tensor in parts:
        array = tensor.numpy()
        assert np.shares_memory(array, tensor.stored.array)
        assert array.tobytes() in data
        assert array.nbytes == tensor.bytes


def test_constants_of_an_inline_tensor_are_views_too(folder: Path) -> None:
    """A small file of many nodes on one inline tensor must not hold it once for each."""
    model = onnx.load(folder / "model.onnx")
    opened = ExportedModel(folder / "model.onnx", model)
    parts = [tensor for node in opened.packed for tensor in node.constants.values() if tensor.part is not None]
    assert parts
    assert all(np.shares_memory(tensor.numpy(), tensor.stored.array) for tensor in parts)


def test_metadata_is_typed(exported: Path) -> None:
    metadata = ExportedModel.open(exported).metadata
    assert (metadata.dialect, metadata.graph, metadata.dtype, metadata.activations) == (
        "rankbook",
        "ort",
        "fp32",
        "none",
    )
    assert len(metadata.layers) == 14
    assert len(metadata.data_sha256) == 64
    assert Metadata.of({"rankbook.layers": "[" * 100_000}).layers == {}
    assert Metadata.of({"rankbook.layers": '{"a": 3}'}).layers == {}


def test_a_swapped_data_file_is_named(folder: Path) -> None:
    ExportedModel.open(folder).verify()
    data = bytearray((folder / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / DATA).write_bytes(data)
    with pytest.raises(ExportedFileError, match=r"model\.onnx\.data is not the file that model\.onnx was written with"):
        ExportedModel.open(folder).verify()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_entry("location", "../secret"), "'../secret' of .* is not a path inside the folder"),
        (set_entry("location", "/etc/passwd"), "'/etc/passwd' of .* is not a path inside"),
        (set_entry("location", ""), "'' of .* is not a path inside"),
        (set_entry("location", "missing"), "missing is missing"),
        (set_entry("offset", "-1"), r"offset and length of .* are \['-1', .*not numbers of bytes"),
        (set_entry("length", "much"), "not numbers of bytes"),
        (set_entry("length", "9" * 18), "truncated"),
        (lambda model: setattr(first_external(model), "data_type", 99), "element type 99, which is not known"),
        (lambda model: first_external(model).dims.__setitem__(0, -5), "has the shape"),
        (lambda model: model.graph.initializer.append(first_external(model)), "several tensors are named"),
        (lambda model: model.graph.node.append(packed(model)), "several layers are named"),
        (lambda model: packed(model).output.pop(), "outputs and 2 inputs; it must have"),
        (lambda model: set_attribute(model, "codes_0", [3]), "attribute codes_0 is .*a first byte and a shape"),
        (lambda model: set_attribute(model, "codes_0", [1 << 40, 9]), "codes ends at byte 1099511627785"),
    ],
)
def test_damage_is_a_sentence(folder: Path, damage: Callable[[onnx.ModelProto], object], message: str) -> None:
    change(folder, damage)
    with pytest.raises(ExportedFileError, match=message):
        ExportedModel.open(folder)
    assert conform.check_model(folder)


def packed(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if "Merged" in node.op_type)


def set_attribute(model: onnx.ModelProto, name: str, value: object) -> None:
    node = packed(model)
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


@pytest.mark.parametrize("seed", range(6))
def test_changed_bytes_end_in_declared_errors(folder: Path, seed: int) -> None:
    """Graphs with a few bytes changed, 25 each: they are read, or refused with a sentence; nothing else comes out."""
    rng, whole = np.random.default_rng(seed), (folder / "model.onnx").read_bytes()
    for _ in range(25):
        graph = bytearray(whole)
        for place in rng.integers(0, len(graph), 3):
            graph[place] = rng.integers(0, 256)
        (folder / "model.onnx").write_bytes(graph)
        conform.check_model(folder)
        with contextlib.suppress(UsageError, ExportedFileError):
            inspect(folder)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.move(folder / DATA, tmp_path / "other" / "data")
    (folder / DATA).symlink_to(tmp_path / "other" / "data")
    with pytest.raises(ExportedFileError, match=r"is a link to .*outside of"):
        ExportedModel.open(folder)


def test_links_of_a_hub_cache_and_hard_links_are_read(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot, hard = (tmp_path / name for name in ("hub/blobs", "hub/snapshots/1", "hard"))
    for made in (blobs, snapshot, hard):
        made.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
        os.link(file, hard / file.name)
    for opened in map(ExportedModel.open, (snapshot, hard)):
        opened.verify()
        assert all(tensor.numpy().nbytes for node in opened.packed for tensor in node.constants.values())


def test_a_tensor_in_an_attribute_of_another_type_is_named(folder: Path) -> None:
    change(
        folder, lambda model: set_attribute(model, "levels_0", numpy_helper.from_array(np.zeros((3, 16), np.float32)))
    )
    assert any("'levels'" in problem and "is float32" in problem for problem in conform.check_model(folder))
