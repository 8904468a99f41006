"""A model is exactly what its source stores: what is missing, left over or wrapped is refused, repaired or said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaModel

from rankbook.calibration.model.loading import load_model, load_tokenizer
from rankbook.calibration.notes import Note
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model, tiny_tokenizer

Tensors = dict[str, Tensor]


def source(folder: Path, change: Callable[[Tensors], Tensors] = lambda tensors: tensors, **settings: Any) -> Path:
    """Write a tiny llama whose tensors and settings are changed afterwards."""
    tiny_model("llama", folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, **settings)
    return folder


def configure(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in names)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (without("layers.1.mlp.up_proj"), {}, r"lacks 1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight\) of 29"),
        (without("layers.1."), {}, r"The last 1 blocks are missing or incomplete"),
        (without(), {"num_hidden_layers": 4}, r"num_hidden_layers 4"),
        (without("lm_head"), {}, "set tie_word_embeddings to true if"),
        (renamed("model.", "net.core."), {}, "instead: it was saved for another architecture"),
        (renamed("model.", "wrapped.model."), {}, r"carry 'wrapped\.' in front"),
        (renamed("q_proj.weight", "q_proj.qweight"), {}, "written by quantizers"),
        (without(), {"num_hidden_layers": 1}, "the weights have block 1 too"),
        (without(), {"attention_bias": False}, r"8 tensors \(.*k_proj\.bias.* no place.*attention_bias"),
        (without(), {"intermediate_size": 96}, r"down_proj\.weight is \(48, 80\), not \(48, 96\)"),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)}, {}, "merge it first"),
    ],
)
def test_what_is_not_stored_is_not_made_up(change: Any, settings: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(source(tmp_path, change, **settings))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "_orig_mod.module."]
)
def test_names_of_known_wrappers_are_repaired_and_said(prefix: str, tmp_path: Path) -> None:
    wrapped = source(tmp_path, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    with pytest.warns(Note, match=r"names of the tensors of .* carry"):
        model = load_model(wrapped)[0]
    want = tiny_model("llama").state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())


def test_wrapped_blocks_are_repaired(tmp_path: Path) -> None:
    wrapped = source(tmp_path, renamed("layers.1.", "layers.1._checkpoint_wrapped_module."))
    with pytest.warns(Note, match="activation checkpointing"):
        model = load_model(wrapped)[0]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, tiny_model("llama").model.layers[1].mlp.up_proj.weight)


def test_what_need_not_be_stored_is_not_missing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        tiny_model("opt", tmp_path / "tied")  # one tensor under two names
        load_model(tmp_path / "tied")
        old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
        load_model(source(tmp_path / "old", lambda tensors: {**tensors, **old}))


def test_weights_of_the_model_without_its_output_layer(tmp_path: Path) -> None:
    """Saved as the base model, names lack ``model.``: transformers adds it; the output layer must be tied then."""
    model = tiny_model("llama", tie_word_embeddings=True)
    base = LlamaModel(model.config)
    base.load_state_dict(model.model.state_dict())
    base.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path)[0].lm_head.weight, model.model.embed_tokens.weight)


def test_tensors_of_no_layer_are_left_out_and_said(tmp_path: Path) -> None:
    with pytest.warns(Note, match=r"1 tensor \(score\.weight\) that the language model does not use"):
        load_model(source(tmp_path, lambda tensors: {**tensors, "score.weight": torch.zeros(2, 48)}))


def test_a_gguf_file_that_lacks_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor", lambda self, name, t: None if "ffn_up" in name else add(self, name, t)
    )
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"tiny\.gguf lacks 1 tensor \(model\.layers\.0\.mlp\.up_proj\.weight\)"):
        load_model(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized already to 4 bits, by GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "quantized already to 4 bits, by AWQ"),
        ({"load_in_4bit": True}, "quantized already to 4 bits, by bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "by bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "by LLM Compressor"),
        ({"quant_method": "torchao"}, "by torchao"),
        ({"quant_method": "unheard-of"}, "by 'unheard-of'"),
    ],
)
def test_sources_that_are_quantized_already(entry: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{said}.*give the model that it was made from"):
        load_model(source(tmp_path, quantization_config=entry))


def fp8(tensors: Tensors) -> Tensors:
    """Store linear layers in blocks of 16 x 16 in fp8."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        blocks = weight.view(weight.shape[0] // 16, 16, weight.shape[1] // 16, 16)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        tensors[name] = (blocks / scale).view_as(weight).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    return tensors


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_becomes_dense_for_every_verb(dtype: torch.dtype | None, tmp_path: Path) -> None:
    tiny_model("llama", num_key_value_heads=4).bfloat16().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(fp8(load_file(path)), path, metadata={"format": "pt"})
    stored = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    configure(tmp_path, quantization_config=stored)
    model = load_model(tmp_path, dtype)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    ids = torch.arange(20)[None]
    got, want = model(ids).logits.float(), tiny_model("llama", num_key_value_heads=4)(ids).logits
    assert (got - want).norm() < 0.08 * want.norm()  # 3 bits of mantissa: 3 % of each weight, several layers


@pytest.mark.parametrize("kind", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn"])
def test_attention_that_needs_a_package_is_not_asked_for(kind: str, tmp_path: Path) -> None:
    model = load_model(source(tmp_path, attn_implementation=kind))[0]
    assert model.config._attn_implementation == "sdpa"
    configure(tmp_path, attn_implementation="eager")
    assert load_model(tmp_path)[0].config._attn_implementation == "eager"


def test_code_of_a_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run the folder's code")

    monkeypatch.setattr("builtins.input", asked)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source(tmp_path, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(ValueError, match=r"needs Python code of its own folder \(own.py\), which"):
        load_model(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_call_of_transformers_leaves_the_question_open() -> None:
    """Every ``from_pretrained`` of an Auto class says whether code is trusted, itself or in its dict."""
    import re

    root = Path(__file__).parents[3]
    calls = re.compile(r"\.(?:from_pretrained|from_config)\((?:[^()]|\([^()]*\))*\)")
    texts = {
        file: file.read_text(encoding="utf-8")
        for part in ("calibration", "exporter", "tools", "plugins")
        for file in (root / part).rglob("*.py")
    }
    # A call between backquotes is named, and one of "FOLDER" is the example of a model card, for the reader to run.
    found = [
        (file, call)
        for file, text in texts.items()
        for call in calls.findall(text)
        if "``" not in call and '"FOLDER"' not in call
    ]
    assert {file.name for file, _ in found} >= {"loading.py", "source_config.py", "tokenizer.py"}
    for file, call in found:
        inside = "**extra" in call and '"trust_remote_code": is_trusted()' in texts[file]
        assert inside or "trust_remote_code=is_trusted()" in call, (file, call)
