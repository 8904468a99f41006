"""The exported folder: sizes, metadata, half precision, bad input, interrupted writes, models above 2 GiB."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from rankbook.calibration.checkpoint import format as ck
from rankbook.calibration.checkpoint.format import CheckpointError
from rankbook.calibration.model.loading import load_model
from rankbook.exporter import external
from rankbook.exporter.export import DATA, MODEL, ExportOptions, export
from rankbook.plugins import contract
from tests.calibration.records import random_record
from tests.exporter.checkpoints import make_checkpoint
from tests.exporter.compare import worst_error
from tests.exporter.rtx import assert_builds, needs_rtx
from tests.tiny import tiny_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of one layer with whole panels and blocks, 3 bits, with an error branch."""
    folder = tmp_path_factory.mktemp("llama")
    options = {"bits": 3, "group_size": 64, "error_branch": "lqer", "error_rank": 4}
    return make_checkpoint(folder, "llama", model=WIDE, **options)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    steps: list[str] = []
    report = export(checkpoint, folder, progress=lambda stage, done, total: steps.append(stage))
    assert set(steps) == {"trace", "write", "check"}
    return folder, report


def test_file_size_is_the_stored_bits_and_the_unquantized_parts(checkpoint, exported):
    folder, report = exported
    opened = ck.open_checkpoint(checkpoint)
    stored = sum(sum(record.spec().stored_bits().values()) for record in ck.load_records(checkpoint).values()) / 8
    plain = sum(opened.tensor(name).nbytes for name in opened.unquantized())
    biases = sum(opened.tensor(f"{name}.bias").nbytes for name, spec in opened.layers.items() if spec.bias)
    size = (folder / DATA).stat().st_size
    # Tensors are aligned to 64 bytes, levels are stored in 16 bits instead of 8, small tensors are in the graph's file.
    assert abs(size - stored - plain - biases) < 0.02 * size
    assert report.data_bytes == size
    assert report.packed_bytes + report.other_bytes == pytest.approx(size, rel=0.02)
    assert report.bits_per_weight == pytest.approx(
        8 * stored / sum(r.codes.numel() for r in ck.load_records(checkpoint).values())
    )


def test_the_packed_bytes_are_those_of_the_checkpoint(checkpoint, exported):
    folder, _ = exported
    model = onnx.load(folder / MODEL)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    opened = ck.open_checkpoint(checkpoint)
    for name in opened.layers:
        codes = opened.tensor(f"{name}.codes").numpy()
        assert np.array_equal(tensors[f"{name}.codes"].view(np.uint8) ^ 0x80, codes)
        assert np.array_equal(tensors[f"{name}.params"], opened.tensor(f"{name}.params").numpy())


def test_nodes_carry_the_plugin_and_the_file_its_origin(exported):
    folder, report = exported
    model = onnx.load(folder / MODEL, load_external_data=False)
    nodes = [node for node in model.graph.node if node.domain == contract.DOMAIN]
    assert {node.op_type for node in nodes} == {"CodebookMatMulLowRank3"}
    assert "model.layers.0.self_attn.q_proj" in {node.name for node in nodes}
    for node in nodes:
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert attributes["plugin_namespace"] == contract.PLUGIN_NAMESPACE.encode()
        assert attributes["plugin_version"] == contract.PLUGIN_VERSION.encode()
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["rankbook.method"] == "rtn"
    assert metadata["rankbook.bits"] == "3"
    assert json.loads(metadata["rankbook.layers"])["model.layers.0.mlp.up_proj"]["rank"] == 4
    assert metadata["rankbook.data_sha256"] == report.data_sha256
    assert hashlib.sha256((folder / DATA).read_bytes()).hexdigest() == report.data_sha256
    assert str(folder.parent) not in model.SerializeToString().decode("latin-1"), "paths of this machine are left out"


def test_inputs_and_outputs_follow_the_convention_of_kv_caches(exported):
    model = onnx.load(exported[0] / MODEL, load_external_data=False)
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["position_ids"] == ["batch", "sequence"]
    assert shapes["past_key_values.0.key"] == ["batch", 2, "past_sequence", 32]
    assert shapes["logits"] == ["batch", 1, 259]
    assert "present.0.value" in shapes


def test_everything_that_generation_needs_lies_beside_the_model(exported):
    names = {path.name for path in exported[0].iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", MODEL, DATA} <= names
    assert not any("safetensors" in name for name in names)


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_graphs_are_valid_and_import_into_tensorrt(checkpoint, dtype, tmp_path):
    report = export(checkpoint, tmp_path / "out", ExportOptions(dtype=dtype))
    assert report.nodes["Attention"] == 1, "head size 32 has a kernel in half precision"
    if dtype == "fp16":  # stock ONNX Runtime has no bfloat16 kernels on a CPU
        model, _ = load_model(checkpoint)
        # 11 bits in every intermediate result: a few times 2^-11.
        assert worst_error(tmp_path / "out", model, logits="last") < 1e-2
    assert_builds(tmp_path / "out")


@needs_rtx
@pytest.mark.trt
@pytest.mark.parametrize(("family", "dtype"), [("gemma2", "fp16"), ("qwen3", "bf16")])
def test_norms_in_another_type_and_inferred_heads_import_into_tensorrt(family, dtype, tmp_path):
    # Gemma 2 scales its norms in float32; the heads of Qwen 3 are inferred by a reshape and normalized.
    checkpoint = make_checkpoint(tmp_path, family, bits=4, model={"num_hidden_layers": 1})
    export(checkpoint, tmp_path / "out", ExportOptions(dtype=dtype))
    if dtype == "fp16":
        model, _ = load_model(checkpoint)
        assert worst_error(tmp_path / "out", model, logits="last") < 1e-2
    assert_builds(tmp_path / "out")


@needs_rtx
@pytest.mark.trt
def test_the_float32_graph_imports_into_tensorrt(exported):
    assert_builds(exported[0])


def test_bad_options_and_folders_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"fp8.*fp32.*fp16.*bf16"):
        export(checkpoint, tmp_path / "out", ExportOptions(dtype="fp8"))
    with pytest.raises(ValueError, match=r"some.*last.*all"):
        export(checkpoint, tmp_path / "out", ExportOptions(logits="some"))
    with pytest.raises(CheckpointError, match=r"rankbook\.json"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"model\.onnx"):
        export(checkpoint, tmp_path / "mine")
    shutil.copytree(checkpoint, tmp_path / "cut")
    data = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        export(tmp_path / "cut", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_previous_output(checkpoint, tmp_path, monkeypatch):
    export(checkpoint, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    write = external.write

    def full_disk(model, path, progress=None):
        write(model, path, progress)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rankbook.exporter.export.external.write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint, tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    report = export(checkpoint, tmp_path / "out")
    assert report.data_bytes == (tmp_path / "out" / DATA).stat().st_size, "a second export does not append"


@pytest.mark.slow
def test_a_model_above_2_gib_never_lies_in_memory(tmp_path):
    rows, columns = 1 << 20, 640
    model = tiny_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config = {**model.config.to_dict(), "hidden_size": columns, "vocab_size": rows, "tie_word_embeddings": True}
    config |= {"head_dim": 16, "dtype": "float32", "architectures": ["LlamaForCausalLM"], "attention_bias": False}
    write_large_checkpoint(tmp_path / "checkpoint", config, rows, columns)
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=watch_memory, args=(peak, stop))
    start = anonymous_bytes()
    watcher.start()
    report = export(tmp_path / "checkpoint", tmp_path / "out")
    stop.set()
    watcher.join()
    assert report.data_bytes > 2.4 * (1 << 30)
    assert peak[0] - start < 1 << 30, "memory of the process, without pages of mapped files"
    graph = onnx.load(tmp_path / "out" / MODEL, load_external_data=False).graph
    stored = next(tensor for tensor in graph.initializer if tensor.name == "model.embed_tokens.weight")
    offset = next(int(item.value) for item in stored.external_data if item.key == "offset")
    table = np.memmap(tmp_path / "out" / DATA, np.float32, "r", offset, (rows, columns))
    assert np.array_equal(table[:: rows // 8, 0], np.arange(0, rows, rows // 8, dtype=np.float32))
    del table
    shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs


def write_large_checkpoint(folder: Path, config: dict[str, object], rows: int, columns: int) -> None:
    """Write a checkpoint whose embedding has 2.5 GiB."""
    shapes = {"q": (64, columns), "k": (32, columns), "v": (32, columns), "o": (columns, 64)}
    layers, tensors = {}, {"model.embed_tokens.weight": torch.zeros(rows, columns)}
    tensors["model.embed_tokens.weight"][:, 0] = torch.arange(rows)
    names = {f"model.layers.0.self_attn.{name}_proj": shape for name, shape in shapes.items()}
    names |= {f"model.layers.0.mlp.{name}_proj": (64, columns) for name in ("gate", "up")}
    names["model.layers.0.mlp.down_proj"] = (columns, 64)
    for name, (out_features, in_features) in names.items():
        record = random_record(out_features, in_features, bits=4, group=64)
        layers[name] = record.spec()
        tensors |= {f"{name}.{part}": tensor for part, tensor in record.pack().items()}
    for name in ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(columns)
    ck.write_checkpoint(folder, ck.CheckpointParts(config, layers, tensors, {}))


def anonymous_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def watch_memory(peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        peak[0] = max(peak[0], anonymous_bytes())
