"""Exported-looking files made by hand, for tests that need no language model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.exporter.file import load
from rankbook.exporter.properties import DATA_SHA256
from rankbook.tools.runtimes import runtimes
from tests.calibration.records import random_record
from tests.ops.cases import op_model

FEATURES = 64


def chain_model(folder: Path, nodes: int = 3, bits: int = 3) -> Path:
    """Write ``model.onnx`` with external data: quantized layers (64, 64) in a row, input x0 (batch, sequence, 64)."""
    folder.mkdir(parents=True, exist_ok=True)
    graph_nodes, constants = [], []
    for index in range(nodes):
        single = op_model(random_record(FEATURES, FEATURES, bits=bits, group=32, seed=index))
        node = single.graph.node[0]
        rename = {name: f"layer{index}.{name}" for name in node.input} | {"x": f"x{index}", "y": f"x{index + 1}"}
        for tensor in single.graph.initializer:
            tensor.name = rename[tensor.name]
            constants.append(tensor)
        node.input[:] = [rename[name] for name in node.input]
        node.output[:] = [rename[name] for name in node.output]
        node.name = f"layers.{index}.proj"
        graph_nodes.append(node)
    shape: list[str | int | None] = ["batch", "sequence", FEATURES]
    graph = helper.make_graph(
        graph_nodes,
        "chain",
        [helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{nodes}", onnx.TensorProto.FLOAT, shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=single.opset_import, functions=single.functions, ir_version=11)
    helper.set_model_props(model, {"rankbook.method": "lcq"})
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    return path


def run_cli(*arguments: object) -> int:
    """Run the command line in this process."""
    from rankbook.tools.cli import main

    return main([str(argument) for argument in arguments])


def stdout_json(capsys: Any) -> Any:
    """Return what a verb printed with ``--json``."""
    return json.loads(capsys.readouterr().out)


def damage(folder: Path, name: str) -> None:
    """Flip the bytes of a stored tensor, as an export that went wrong would: the file's hash is that of its data."""
    graph = load(folder / "model.onnx").graph
    tensor = next(item for item in graph.initializer if item.name == name)
    assert tensor.data_location == onnx.TensorProto.EXTERNAL
    entries = {item.key: item.value for item in tensor.external_data}
    path, offset, length = folder / entries["location"], int(entries["offset"]), int(entries["length"])
    content = bytearray(path.read_bytes())
    content[offset : offset + length] = bytes(byte ^ 0x5A for byte in content[offset : offset + length])
    path.write_bytes(content)
    note_hash(folder)


def note_hash(folder: Path) -> None:
    """Write into the graph that its data are those beside it."""
    model = load(folder / "model.onnx")
    for prop in model.metadata_props:
        if prop.key == DATA_SHA256:
            prop.value = sha256_file(folder / "model.onnx.data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, reason: str | None = None) -> None:
    """Make a runtime available, or unavailable for a reason."""
    found = runtimes()
    assert isinstance(found, dict)
    monkeypatch.setitem(found, name, replace(found[name], unavailable=lambda: reason))
