"""Tiny random models of the decoder families of transformers, each of two or four blocks, with a byte-level tokenizer.

A family is its ``model_type``. Fields of its configuration are those of `_SMALL` that it has with a value, and its own
in `FAMILIES`. Windows of attention are shorter than the texts of the sweep, so that a file without them is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 259
"""Bytes, and three special tokens."""
EXPERTS = 4
_SMALL: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258},
    **{"hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 8},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **{"shared_expert_intermediate_size": 64, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_head_dim": 16, "linear_num_heads": 4, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 64},
    **{"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16},
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "state_size": 16, "chunk_size": 16},
}
_HYBRID = ["linear_attention", "full_attention"]
_SLIDING = ["sliding_attention", "full_attention"]
_CONV = ["conv", "full_attention"]
_SPARSE = ["dense", "sparse"]
_MLA = {"num_key_value_heads": 4}
_OLD = {"n_inner": 128}
_PER_LAYER = {
    **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32},
    **{"layer_types": _SLIDING * 2, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
}
"""The last two blocks read the keys and values of the first two."""
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi3", "qwen3_moe", "mixtral")},
    "gpt_oss": {"layer_types": _SLIDING},
    "gemma3_text": {"layer_types": _SLIDING},
    "deepseek_v3": _MLA,
    "llava": {"text": "llama", "image_token_index": 255},
    "gpt2": _OLD,
    "qwen2_moe": {},
    "olmoe": {},
    "olmo2": {},
    "glm4": {},
    "granite": {},
    "qwen3_next": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "ministral": {"layer_types": _SLIDING, "head_dim": 16},
    "ministral3": {},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "gemma3n_text": {
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "laurel_rank": 32,
        **_PER_LAYER,
    },
    "gemma4_text": {
        **{"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 64},
        **{"per_layer_config": None, "global_head_dim": 32, **_PER_LAYER},
    },
    "phi": _MLA,
    "phimoe": {},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {**_MLA, "index_topk": 8, "index_n_heads": 8},
    "deepseek_v4": {},
    "llama4_text": {
        "intermediate_size_mlp": 128,
        "attention_chunk_size": 64,
        "floor_scale": 8,
        "moe_layers": [0, 1],
        "no_rope_layers": [1, 0],
        "layer_types": ["chunked_attention", "full_attention"],
    },
    **{name: {} for name in ("glm", "glm4_moe", "olmo", "granitemoe", "cohere", "starcoder2", "stablelm", "seed_oss")},
    "glm4_moe_lite": _MLA,
    "olmo3": {"layer_types": _SLIDING},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granitemoehybrid": {"layer_types": _HYBRID, "mamba_expand": 2},
    "cohere2": {"layer_types": _SLIDING},
    "arcee": {},
    "apertus": {},
    "falcon": {
        "head_dim": None,
        "multi_query": False,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 128,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_bigcode": _OLD,
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8, **_OLD},
    "codegen": {"rotary_dim": 8, **_OLD},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": 128},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"hidden_size": 64},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "persimmon": {},
    "xglm": {"pad_token_id": 1},
    "exaone4": {"layer_types": _SLIDING},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": _CONV, "full_attn_idxs": None, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONV, "num_dense_layers": 1},
    "lfm3": {"layer_types": _CONV},
    "mamba": {"time_step_rank": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        "num_hidden_layers": 4,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 64,
    },
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_dt_rank": 32, "use_mamba_kernels": False},
    },
    "bamba": {"attn_layer_indices": [1]},
    "zamba2": {
        **{"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "num_key_value_heads": 4},
        **{"n_mamba_heads": 8, "mamba_headdim": 16, "adapter_rank": 32, "use_mamba_kernels": False},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    "bitnet": {},
    "minimax": {"layer_types": _HYBRID, "block_size": 16, "head_dim": 16},
    "minimax_m2": {},
    "kimi_linear": {
        **{"num_key_value_heads": 4, "linear_head_dim": 32, "layer_types": _HYBRID, "q_lora_rank": None},
        "mlp_layer_types": _SPARSE,
    },
    "minicpm3": _MLA,
    "mimo_v2_flash": {"layer_types": _SLIDING, "mlp_layer_types": _SPARSE},
    "qwen4_exp_text": {
        **{"layer_types": ["linear_attention", "indexed_attention"], "indexer_n_heads": 4, "indexer_kv_heads": 1},
        **{"indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    "dbrx": {
        **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "jetmoe": {"kv_channels": 16},
    **{name: {} for name in ("nanochat", "helium", "flex_olmo", "solar_open")},
    "exaone_moe": {"layer_types": _SLIDING, "mlp_layer_types": _SPARSE},
    "mistral3": {"text": "mistral", "image_token_index": 255},
    "gemma3": {
        **{"text": "gemma3_text", "image_token_index": 255, "boi_token_index": 254, "eoi_token_index": 253},
        "mm_tokens_per_image": 4,
    },
    **{
        name: {
            **{"text": f"{name}_text", "image_token_id": 255, "video_token_id": 254},
            **{"vision_start_token_id": 253, "vision_end_token_id": 252},
        }
        for name in ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
    },
}
"""Families in order of use, with the fields of their configurations; ``text`` is the language model of a wrapper."""
FURTHER: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _SLIDING},
    "axk1": _MLA,
    "bailing_hybrid": {**_MLA, "layer_types": _HYBRID},
    "biogpt": {},
    "cohere2_moe": {"layer_types": _SLIDING},
    "cwm": {},
    "falcon_mamba": {"time_step_rank": 32},
    "glm_moe_dsa": {**_MLA, "index_topk": 8, "index_n_heads": 8, "indexer_types": ["full", "shared"]},
    "gpt_neox_japanese": {},
    "granitemoeshared": {},
    "hy_v3": {},
    "internlm3": {},
    "jais2": {},
    "laguna": {"layer_types": _SLIDING},
    "modernbert-decoder": {},
    "olmo_hybrid": {"layer_types": _HYBRID},
    "vaultgemma": {},
    "youtu": _MLA,
}
"""Families that were tried later, to find out what rules hold beyond those of the list."""
MOST_USED = (*tuple(FAMILIES)[:19], "llama4_text")
"""The families of the test that runs in CI."""
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_INNER = {"qwen2_5_vl_text": _MROPE, "qwen3_vl_text": _MROPE}
_VISION = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28},
    **{"patch_size": 14, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    **{"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "projection_dim": 32, "head_dim": 16},
}
_KEPT = ("A_log", "D", "dt_bias")
"""Parameters whose first values are not noise: a state must not grow."""


def random_model(family: str) -> Any:
    """Return a random float32 model of a family."""
    import torch

    config = configuration(family)
    torch.manual_seed(0)
    model = _class(config)._from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    _fill(model)
    return model


def tiny(family: str, folder: Path) -> Any:
    """Save a random model of a family, with a tokenizer, to ``folder``, and return it.

    Raises:
        ValueError: Its logits are not finite.
    """
    import torch

    model = random_model(family)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(24)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the tiny model itself gives NaN or infinity")
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def configuration(family: str) -> Any:
    """Return the configuration of a tiny model."""
    from transformers import AutoConfig

    own = dict(FAMILIES.get(family) or FURTHER.get(family) or _INNER.get(family, {}))
    default = AutoConfig.for_model(family)
    if "text" in own:
        text, vision = configuration(own.pop("text")), type(default.vision_config)
        own.setdefault("tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
        small = vision(**_that_it_has(vision(), _VISION)).to_dict()
        return AutoConfig.for_model(family, text_config=text.to_dict(), vision_config=small, **own)
    settings = {**_that_it_has(default, _SMALL), **own}
    return AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not None})


def tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<s>", "</s>", "<pad>")
    known = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    made = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(known)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    kind: Any = PreTrainedTokenizerFast  # its signature is untyped
    return kind(tokenizer_object=made, bos_token=special[0], eos_token=special[1], pad_token=special[2])


def _class(config: Any) -> Any:
    """Return the class of a model; Mistral 4 alone is a language model without an entry of its own."""
    from transformers.models.auto import modeling_auto as auto

    if config.model_type == "mistral4":
        from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

        return Mistral4ForCausalLM
    tables = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    if hasattr(
        config, "vision_config"
    ):  # transformers gives some wrappers a text model that cannot read their configuration
        tables = tables[::-1]
    return next(table[type(config)] for table in tables if type(config) in table)


def _that_it_has(default: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a configuration has with a value, under its own spelling of their names."""
    found = {}
    aliases = default.attribute_map or {}
    for name, value in fields.items():
        try:
            there = getattr(default, name, None)
        except Exception:  # some configurations refuse to name what differs between their layers
            there = value
        if there not in (None, False) or name.endswith("token_id"):
            found[aliases.get(name, name)] = value
    if not vars(default).get("sliding_window"):
        found.pop("sliding_window", None)
    return found


def _fill(model: Any) -> None:
    """Draw every weight, biases and norms around their first values: a lost one must be noticed."""
    import torch
    from torch import nn

    noise = torch.Generator().manual_seed(1)
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}

    def draw(like: Any) -> Any:
        return torch.randn(like.shape, generator=noise)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 1:
                    parameter.add_(0.1 * draw(parameter))
                elif isinstance(module, nn.Embedding) and id(module) in ends:
                    parameter.copy_(draw(parameter))
                elif name not in _KEPT and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    parameter.copy_(parameter.shape[-1] ** -0.5 * draw(parameter))
            for name, buffer in module.named_buffers(recurse=False):
                if "correction_bias" in name:
                    buffer.add_(0.1 * draw(buffer))
