"""What differs between families: the rules, and the families that have others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.adapter import ModelAdapter, adapter_of
from rankbook.calibration.model.families.phi3 import Phi3
from rankbook.calibration.model.loading import load_model
from tests.calibration.runs import options
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer

AUTO: Any = AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_every_tested_family(family: str) -> None:
    """Checked against what the model's own cache holds after one run."""
    model = tiny_model(family)
    adapter = adapter_of(model)
    assert type(adapter) is (Phi3 if family == "phi3" else ModelAdapter)
    assert len(adapter.blocks().modules) == adapter.layers == 2
    cache = model(torch.arange(6)[None], use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (1, adapter.key_heads, 6, adapter.head_size)
    outputs = adapter.cached_outputs()
    width = {"phi3": 2}.get(family, 1) * adapter.key_heads * adapter.head_size
    assert all(output.module.get_parameter("weight").shape[0] - output.start == width for output in outputs)
    assert sum(output.kinds for output in outputs) == 4
    assert adapter.embeddings().tied == model.config.tie_word_embeddings
    assert (adapter.rotary() is None) == (family == "opt")
    assert adapter.windows() == {"mistral": [8, 8], "gemma2": [8, -1]}.get(family, [-1, -1])


def test_a_fused_projection_of_another_family_is_refused() -> None:
    """CodeGen has a qkv_proj too, whose features come in another order than Phi-3's."""
    config = AutoConfig.for_model(
        "codegen", vocab_size=64, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=32
    )
    with pytest.raises(ValueError, match="in 0 of 2 layers; leave out --kv-bits"):
        adapter_of(AUTO.from_config(config)).cached_outputs()


def test_a_model_of_something_else_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a decoder-only model of transformers"):
        adapter_of(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("changes", [{}, {"quantize_lm_head": 8}, {"quantize_embeddings": 8}], ids=str)
def test_two_stored_weights_stay_two_whatever_the_flag_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    """config.json says tied, the source stores an output layer of its own: it counts, and after a reload too."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert AutoConfig.from_pretrained(tmp_path / "model").tie_word_embeddings
    ids = torch.arange(10)[None]
    report = quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, method="rtn", bits=8, **changes))
    assert "shared_with" not in report.totals["lm_head"]
    loaded, _ = load_model(tmp_path / "out")
    assert not AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings
    with torch.no_grad():
        change = (loaded(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert change < 0.05  # 8 bits; with the embedding as output layer it is above 1


def test_a_wrapper_whose_flag_differs_from_its_language_models(tmp_path: Path) -> None:
    """Mistral 3 ties by the wrapper's flag alone; the checkpoint says the same at both places."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = AutoConfig.for_model("mistral", **sizes, vocab_size=259, num_key_value_heads=1, head_dim=16)
    vision = AutoConfig.for_model("pixtral", **sizes, image_size=28, patch_size=14)
    kind: Any = transformers.Mistral3ForConditionalGeneration
    model = kind(transformers.Mistral3Config(text_config=text, vision_config=vision))
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", options(tmp_path, method="rtn"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != tied
