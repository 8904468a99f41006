"""A LLaVA-style model: the language blocks are quantized, the vision tower and the projector are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankbook.calibration.model.loading import load_model
from rankbook.tools import errors
from rankbook.tools.runtimes import ort
from rankbook.tools.runtimes.ort import OrtModel
from tests.tiny import tiny_tokenizer, write_text
from tests.tools.files import run_cli, stdout_json


def tiny_llava(folder: Path) -> Any:
    """Save and return a random LLaVA whose vision tower has as many blocks as its language model."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(hidden_size=32, image_size=16, patch_size=8, projection_dim=16, **sizes)  # type: ignore[arg-type]
    sizes |= {"intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 128}
    text = LlamaConfig(vocab_size=259, hidden_size=48, tie_word_embeddings=False, **sizes)  # type: ignore[arg-type]
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=258, vision_feature_layer=-1)
    torch.manual_seed(0)
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with the model, its checkpoint ``q`` with static activations, and the file ``onnx``."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava(folder / "model")
    write_text(folder / "text.txt")
    how = ["--method", "rtn", "--bits", 4, "--error-branch", "lqer", "--error-rank", 2, "--activations", "static8"]
    calib = ["--calib", folder / "text.txt", "--calib-sequences", 2, "--calib-length", 16]
    assert run_cli("quantize", folder / "model", *how, *calib, "-o", folder / "q", "--quiet") == 0
    assert run_cli("export", folder / "q", "-o", folder / "onnx", "--logits", "all", "--quiet") == 0
    return folder


def test_only_the_language_blocks_are_quantized(work):
    before, _ = load_model(work / "model")
    after, _ = load_model(work / "q")
    packed = {name for name in after.state_dict() if name.endswith(".codes")}
    assert len(packed) == 14
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    kept = {name: tensor for name, tensor in after.state_dict().items() if name in before.state_dict()}
    assert sum("vision_tower" in name for name in kept) > 20
    assert sum("multi_modal_projector" in name for name in kept) == 4
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in kept.items())


def test_images_still_reach_the_quantized_language_model(work):
    model, _ = load_model(work / "q")
    ids = torch.tensor([[5, 258, 258, 258, 258, 7]])  # 4 patches of an image of 16 x 16
    with torch.no_grad():
        logits = [model(input_ids=ids, pixel_values=torch.full((1, 3, 16, 16), value)).logits for value in (0.1, 0.9)]
    assert bool(torch.isfinite(logits[0]).all())
    assert not torch.equal(logits[0][:, -1], logits[1][:, -1])


def test_the_exported_file_is_the_language_model(work, capsys):
    tokens = np.random.default_rng(0).integers(0, 250, (2, 9))
    model, _ = load_model(work / "q")
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    got = OrtModel(work / "onnx").logits(tokens)
    # Inputs are rounded to 8 bits: where float32 sums fall on the other side, a value moves by a step.
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    assert run_cli("parity", work / "onnx", "--tokens", 8, "--json", "--quiet") == 0
    report = stdout_json(capsys)
    assert report["passed"]
    assert report["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    assert len(report["layers"]) == 14


def test_embedded_tokens_bring_an_image_to_the_exported_file(work, tmp_path, capsys):
    flags = ["--inputs", "embeds", "--logits", "all", "--quiet"]
    assert run_cli("export", work / "q", "-o", tmp_path / "onnx", *flags) == 0
    model, _ = load_model(work / "q")
    embedded: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _m, _a, values: embedded.append(values["inputs_embeds"].numpy()), with_kwargs=True
    )
    ids = torch.tensor([[5, 258, 258, 258, 258, 7]])
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=torch.full((1, 3, 16, 16), 0.3)).logits.numpy()
    session = ort.session(tmp_path / "onnx" / "model.onnx")
    feeds = {
        value.name: np.zeros((1, 2, 0, 12), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    feeds |= {"inputs_embeds": embedded[0], "attention_mask": np.ones((1, 6), np.int64)}
    (got,) = session.run(["logits"], {**feeds, "position_ids": np.arange(6)[None]})
    # As for text: a rounding that falls on the other side moves a value by a step.
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    assert run_cli("generate", tmp_path / "onnx", "-p", "x") == errors.USAGE
    assert "--inputs ids" in capsys.readouterr().err


def test_it_generates_and_is_evaluated_on_text(work, capsys):
    for name in ("q", "onnx"):
        command = ["generate", work / name, "-p", "the", "--max-new-tokens", 3, "--ignore-eos", "--json", "--quiet"]
        assert run_cli(*command) == 0
        assert stdout_json(capsys)["tokens"] == 3
    text = ["--text", work / "text.txt", "--context", 16, "--max-tokens", 32, "--json", "--quiet"]
    assert run_cli("eval", work / "q", *text, "--reference", work / "model", "--kv-bits", 8) == 0
    assert 0 < stdout_json(capsys)["kl"] < 0.1
