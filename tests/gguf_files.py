"""Tiny GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def write_gguf(path: Path) -> None:
    """Write a random one-block llama with a byte-level tokenizer as GGUF."""
    gguf = pytest.importorskip("gguf")
    hidden, wide, vocabulary = 32, 64, 64
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("0") + i) for i in range(vocabulary - 1)), "ab"])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, hidden), "output": (vocabulary, hidden), "blk.0.ffn_down": (hidden, wide)}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (wide, hidden) for name in ("gate", "up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.1 * generator.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
