"""Tiny random models of every tested family, with a byte-level tokenizer, for the tests of all parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # tensors this small gain nothing from threads, and a busy machine makes them wait

FAMILIES = ("llama", "opt", "qwen2", "qwen3", "mistral", "gemma2", "phi3")
"""Families that every part is tested with."""
OWN_ATTENTION = ("bloom", "codegen", "gptj", "gpt_neo", "xglm")
"""Families that `tiny_model` knows too, whose attention is code of their own."""
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Bytes and special tokens: 259, which is not a multiple of a panel of 32 rows."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # not a multiple of 32: the last block of a row is padded
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "tie_word_embeddings": False,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8, "head_dim": 12},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "phi3": {},
    "bloom": {},
    "codegen": {"rotary_dim": 8, "n_inner": 80},
    "gptj": {"rotary_dim": 8, "n_inner": 80},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "intermediate_size": 80},
    "xglm": {"ffn_dim": 80, "pad_token_id": 1},
}


def tiny_model(family: str, folder: Path | None = None, *, seed: int = 0, **overrides: Any) -> Any:
    """Return a random float32 model of ``family``; with ``folder``, save it and a tokenizer there.

    Keyword arguments override fields of the model's configuration.
    """
    settings = {**_DECODER, **_FAMILY[family], **overrides}
    if family == "opt" or family in OWN_ATTENTION:
        for name in {"intermediate_size", "num_key_value_heads"} - set(_FAMILY[family]):
            settings.pop(name)
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM  # as in the rest of the tests: most of transformers has no types
    model = auto.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32).eval()
    _spread(model)
    if folder is not None:
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return model


def tiny_tokenizer() -> Any:
    """Return a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL_TOKENS
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def write_text(path: Path, characters: int = 4000) -> Path:
    """Write deterministic English-like text of ``characters`` letters to ``path``."""
    words = "the quick brown fox jumps over a lazy dog while seven wizards boil".split()
    text: list[str] = []
    state = 1
    while sum(len(word) + 1 for word in text) < characters:
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        text.append(words[(state >> 16) % len(words)])
    path.write_text(" ".join(text)[:characters] + "\n", encoding="utf-8")
    return path


def _spread(model: Any) -> None:
    """Give biases and norms random values, so that a test notices when one is lost."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
