"""`inspect` describes everything that the tools write, and says clearly what it does not know."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import onnx
import pytest
from onnx import helper

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.exporter.export import export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.options import ExportOptions
from rankbook.tools import errors
from rankbook.tools.inspect.inspection import inspect
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import chain_model, run_cli, stdout_json


def test_an_onnx_file_shows_its_layers(tmp_path, capsys):
    path = chain_model(tmp_path / "onnx")
    assert run_cli("inspect", path.parent, "--json") == 0
    report = stdout_json(capsys)
    assert report["kind"] == "onnx"
    assert [layer["name"] for layer in report["layers"]] == [f"layers.{index}.proj" for index in range(3)]
    layer = report["layers"][0]
    assert (layer["bits"], layer["out_features"], layer["in_features"], layer["group"]) == (3, 64, 64, 32)
    assert layer["method"] == "lcq"
    assert report["bits_per_weight"] == pytest.approx(layer["stored_bits"])
    assert report["facts"]["metadata"] == {"rankbook.method": "lcq"}


def test_a_plain_model_shows_dense_layers(tmp_path):
    header = {
        "b.10.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]},
        "b.2.weight": {"dtype": "BF16", "shape": [4, 2], "data_offsets": [16, 32]},
        "norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = inspect(tmp_path)
    assert found.kind == "model"
    assert [(layer.name, layer.bits) for layer in found.layers] == [("b.2", 16), ("b.10", 16)]


def test_tied_embeddings_count_once(tmp_path: Path):
    """Layers of 2 bits and embeddings of 8: the embeddings were counted twice, with their bits (a file) or without."""
    checkpoint = make_checkpoint(tmp_path, "llama", model={"tie_word_embeddings": True}, bits=2, quantize_embeddings=8)
    report = export(checkpoint, tmp_path / "onnx", ExportOptions())
    specs = open_checkpoint(checkpoint).layers
    once = [spec for name, spec in specs.items() if name != "lm_head"]
    wanted = sum(sum(spec.stored_bits().values()) for spec in once) / sum(spec.weights for spec in once)
    found = inspect(checkpoint)
    assert found.bits_per_weight == pytest.approx(wanted)
    assert report.bits_per_weight == pytest.approx(wanted)
    shared = {layer.name: layer.stored_bits or 0 for layer in found.layers}
    assert shared["lm_head"] == 0 < shared["model.embed_tokens"]
    held = inspect(tmp_path / "onnx")
    bits = [layer.stored_bits or 0 for layer in held.layers]
    weights = [layer.out_features * layer.in_features for layer in held.layers]
    file = ExportedModel.open(tmp_path / "onnx")
    constants = {tensor.name: tensor for node in file.packed for tensor in node.constants.values()}
    stored = sum(8 * tensor.bytes for name, tensor in constants.items() if not name.endswith(".bias"))
    assert sum(b * w for b, w in zip(bits, weights, strict=True)) == pytest.approx(stored)
    assert held.bits_per_weight == pytest.approx(stored / sum(spec.weights for spec in once))


def test_a_file_that_is_not_ours_is_a_clear_sentence(tmp_path, capsys):
    node = helper.make_node("Relu", ["x"], ["y"])
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ports[:1], ports[1:])), tmp_path / "other.onnx")
    assert run_cli("inspect", tmp_path / "other.onnx") == errors.USAGE
    assert "not a file of rankbook" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 100), "not a readable ONNX model"),
        (lambda folder: (folder / "model.onnx").write_bytes(b""), "empty graph"),
        (lambda folder: (folder / "model.onnx.data").unlink(), "is missing"),
        (lambda folder: (folder / "model.onnx.data").write_bytes(b"short"), "truncated"),
        (lambda folder: (folder / "model.onnx").unlink(), "holds no engine.json and no rankbook.json"),
    ],
)
def test_damaged_files_are_named(damage, said, tmp_path, capsys):
    path = chain_model(tmp_path / "onnx", nodes=1)
    damage(path.parent)
    assert run_cli("inspect", path.parent) == errors.USAGE
    assert said in capsys.readouterr().err


def test_an_engine_without_its_description_is_refused(tmp_path, capsys):
    (tmp_path / "model.engine").write_bytes(b"x")
    assert run_cli("inspect", tmp_path / "model.engine") == errors.USAGE
    assert "engine.json" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [0, 4, 8])
def test_a_gguf_file_that_claims_more_than_it_holds_is_refused_soon(kind: int, tmp_path):
    """An array of 2**40 elements in a file of 97 bytes: gguf would look at each of them."""
    name = struct.pack("<Q", 1) + b"a"
    array = struct.pack("<IIQ", 9, kind, 2**40)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name + array + bytes(48))
    start = time.process_time()
    with pytest.raises(errors.UsageError, match=r"ends within a field|is damaged"):
        inspect(tmp_path / "a.gguf")
    assert time.process_time() - start < 5
