"""Tiny GGUF files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_HALVES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()},
}
"""Where blocks of a type hold float16 numbers, if not at their start alone; of MXFP4 nowhere."""


def blocks(kind: str, shape: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """Return random blocks of a type (N, bytes of a row): any codes and scales, and float16 numbers near 0.01."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (shape[0] * shape[1] // weights, size), dtype=np.uint8)
    for at in _HALVES.get(kind, (0,)):
        data[:, at : at + 2] = generator.uniform(0.001, 0.01, (len(data), 1)).astype(np.float16).view(np.uint8)
    if kind == "MXFP4":
        data[:, 0] = generator.integers(115, 122, len(data))
    return data.reshape(shape[0], -1)


def write_gguf(
    path: Path, *, hidden: int = 32, wide: int = 64, tied: bool = False, experts: int = 0, **kinds: Any
) -> None:
    """Write a random one-block llama with a byte-level tokenizer as GGUF; with experts a Qwen3 MoE.

    ``kinds`` are types of blocks by name of a matrix (``attn_q``, ``token_embd``); the others are in float32.
    """
    gguf = pytest.importorskip("gguf")
    vocabulary = 64
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(wide)
        writer.add_key_length(hidden // 2)
        writer.add_value_length(hidden // 2)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("0") + i) for i in range(vocabulary - 1)), "ab"])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    end, stack = ("_exps", (experts,)) if experts else ("", ())
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, hidden), "output": (vocabulary, hidden)}
    shapes |= {f"blk.0.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}{end}": (*stack, wide, hidden) for name in ("gate", "up")}
    shapes[f"blk.0.ffn_down{end}"] = (*stack, hidden, wide)
    if experts:
        shapes["blk.0.ffn_gate_inp"] = (experts, hidden)
    if tied:
        del shapes["output"]
    for seed, (name, shape) in enumerate(shapes.items()):
        if kind := kinds.get(name.rpartition(".")[2]):
            form = gguf.GGMLQuantizationType[kind]
            made = blocks(kind, (math.prod(shape[:-1]), shape[-1]), seed).reshape(*shape[:-1], -1)
            writer.add_tensor(f"{name}.weight", made, raw_dtype=form)
        else:
            writer.add_tensor(f"{name}.weight", 0.1 * generator.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    for name in ("q", "k") if experts else ():
        writer.add_tensor(f"blk.0.attn_{name}_norm.weight", np.ones(hidden // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
