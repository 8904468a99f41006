"""Every family runs in stock ONNX Runtime with the logits of torch: prompt, then steps with a cache, with padding."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.loading import load_model
from rankbook.exporter.conform import check_model
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.skeleton import build
from tests.exporter.checkpoints import FAMILY_OPTIONS, make_checkpoint
from tests.exporter.compare import worst_error
from tests.tiny import FAMILIES, OWN_ATTENTION, tiny_tokenizer, write_text

# float32 sums in another order, through two layers; 1e-6 is typical.
TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_torch(family, tmp_path, one_trace):
    checkpoint = make_checkpoint(tmp_path, family, **FAMILY_OPTIONS[family])
    report = export(checkpoint, tmp_path / "out")
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE
    assert check_model(tmp_path / "out") == []
    operators = sum(count for name, count in report.nodes.items() if name.startswith("Codebook"))
    assert operators == report.layers
    assert_every_output_has_a_shape(tmp_path / "out" / "model.onnx")
    report = export(checkpoint, tmp_path / "ort", ExportOptions(graph="ort"))
    assert bool(report.standard_attention) == (adapter_of(model).head_size % 8 > 0)
    assert worst_error(tmp_path / "ort", model, logits="last", rows=1) < TOLERANCE


@pytest.mark.parametrize("family", OWN_ATTENTION[:2])
def test_models_that_add_the_mask_themselves_get_numbers(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path, family, bits=4)
    export(checkpoint, tmp_path / "out", ExportOptions(logits="all"))
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="all") < TOLERANCE
    if family == OWN_ATTENTION[0]:
        report = export(checkpoint, tmp_path / "ort", ExportOptions(logits="all", graph="ort"))
        assert report.standard_attention == dict.fromkeys("01", "its attention is code of its own")
        assert worst_error(tmp_path / "ort", model, logits="all") < TOLERANCE


CHANGING: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    "phi3": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [4.0] * 6,
        },
    },
}
"""Configurations whose rotary frequencies change beyond 128 positions."""


@pytest.mark.parametrize("family", CHANGING)
def test_frequencies_that_change_limit_the_context(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path, family, model=CHANGING[family], bits=4)
    export(checkpoint, tmp_path / "out")
    model, _ = load_model(checkpoint)
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE
    stored = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {item.key: item.value for item in stored.metadata_props}["rankbook.context"] == "128"


@pytest.mark.parametrize(("family", "owner"), [("llama", "lm_head"), ("qwen3", "model.embed_tokens")])
def test_what_is_stored_decides_whether_the_output_layer_is_tied(family, owner, tmp_path):
    checkpoint = make_checkpoint(tmp_path, family, bits=4)
    config = json.loads((checkpoint / "config.json").read_text())
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    skeleton = build(open_checkpoint(checkpoint), torch.float32)
    assert skeleton.owners["lm_head.weight"] == f"{owner}.weight"


@pytest.mark.parametrize("graph", ["standard", "ort"])
def test_last_logits_are_those_of_the_last_token_of_each_row(graph, tmp_path):
    checkpoint = make_checkpoint(tmp_path, "llama", model={"head_dim": 16}, bits=4)
    export(checkpoint, tmp_path / "out", ExportOptions(graph=graph))
    model, _ = load_model(checkpoint)
    rows = [torch.arange(60, 60 + length)[None] for length in (3, 7, 1)]
    with torch.no_grad():
        want = np.concatenate([model(input_ids=row).logits[:, -1].numpy() for row in rows])
    ids, mask = np.full((3, 7), 258), np.zeros((3, 7), np.int64)
    for number, row in enumerate(rows):
        ids[number, : row.shape[1]], mask[number, : row.shape[1]] = row, 1
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.tile(np.arange(7), (3, 1))}
    for value in session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((3, value.shape[1], 0, value.shape[3]), np.float32)
    got = session.run(["logits"], feeds)[0]
    assert got.shape == (3, 1, want.shape[1])
    assert np.abs(got[:, 0] - want).max() < TOLERANCE * np.abs(want).max()


VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"hidden_size": 48, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "qwen2_5_vl": {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 48},
}


@pytest.mark.parametrize("family", VISION)
def test_a_language_model_without_a_class_of_its_own_is_traced_within_its_wrapper(family, tmp_path):
    text: dict[str, Any] = {"vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    tokens = {"image_token_id": 255, "video_token_id": 254, "vision_start_token_id": 253, "vision_end_token_id": 252}
    config = AutoConfig.for_model(family, text_config=text, vision_config=VISION[family], **tokens)
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    calib = str(write_text(tmp_path / "text.txt"))
    how = QuantizeOptions(method="rtn", bits=4, group_size=16, calib=calib, calib_sequences=2, calib_length=16)
    quantize_model(tmp_path / "model", tmp_path / "q", how)
    with pytest.raises(ValueError, match="--inputs ids"):
        export(tmp_path / "q", tmp_path / "out", ExportOptions(inputs="embeds"))
    export(tmp_path / "q", tmp_path / "out")
    model, _ = load_model(tmp_path / "q")
    assert worst_error(tmp_path / "out", model, logits="last") < TOLERANCE


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("opt", 4), ("gemma2", 8)])
def test_packed_embedding_and_head_are_operators_too(family, bits, tmp_path):
    packed = {"quantize_embeddings": bits, "quantize_lm_head": bits}
    checkpoint = make_checkpoint(tmp_path, family, bits=4, **packed)
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
