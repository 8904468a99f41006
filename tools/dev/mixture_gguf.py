"""Writes a random mixture of experts as GGUF, which llama.cpp and rankbook then run with the same 4-bit weights.

    python -m rankbook.tools.dev.mixture_gguf mixture.gguf
    rankbook import mixture.gguf -o mixture && rankbook export mixture -o mixture-onnx --graph ort
    rankbook bench mixture-onnx@native-int8 --peers llamacpp=mixture.gguf --threads 1

Blocks have the shape of Qwen3-30B-A3B, all matrices but the router are Q4_0. There are few blocks and few words, so
that the experts are most of what a token reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankbook.tools.errors import USAGE

Array = np.ndarray[Any, Any]
_GROUP, _BYTES = 32, 18
"""Weights and bytes of a block of Q4_0: a float16 scale, and 4 bits a weight."""
_SPREAD = 4.6
"""Standard deviation of the integers -8 to 7."""


@dataclass(frozen=True)
class Shape:
    """A model: tokens, blocks, hidden features, heads of queries and keys, features of heads and experts, experts."""

    words: int = 4096
    blocks: int = 2
    hidden: int = 2048
    heads: int = 32
    key_heads: int = 4
    head: int = 128
    inner: int = 768
    experts: int = 128
    chosen: int = 8


def write(path: Path, shape: Shape, seed: int = 0) -> None:
    """Write the model; outputs of every matrix are about as large as its inputs."""
    import gguf

    library: Any = gguf
    writer = library.GGUFWriter(path, "qwen3moe")
    _describe(writer, shape)
    rng = np.random.default_rng(seed)
    for name, sizes in _matrices(shape):
        writer.add_tensor(f"{name}.weight", _packed(sizes, rng), raw_dtype=library.GGMLQuantizationType.Q4_0)
    for block in range(shape.blocks):
        router = rng.standard_normal((shape.experts, shape.hidden), np.float32) * np.float32(shape.hidden**-0.5)
        writer.add_tensor(f"blk.{block}.ffn_gate_inp.weight", router)
        for name, size in (
            ("attn", shape.hidden),
            ("ffn", shape.hidden),
            ("attn_q", shape.head),
            ("attn_k", shape.head),
        ):
            writer.add_tensor(f"blk.{block}.{name}_norm.weight", np.ones(size, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, shape: Shape) -> None:
    writer.add_block_count(shape.blocks)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.words)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.chosen)
    writer.add_expert_feed_forward_length(shape.inner)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", *(f"w{number}" for number in range(3, shape.words))])
    writer.add_token_types([1] * shape.words)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape (..., out features, in features) of what is packed."""
    queries, keys = shape.heads * shape.head, shape.key_heads * shape.head
    for name in ("token_embd", "output"):
        yield name, (shape.words, shape.hidden)
    for block in range(shape.blocks):
        sizes = {"q": (queries, shape.hidden), "k": (keys, shape.hidden), "v": (keys, shape.hidden)}
        for name, size in {**sizes, "output": (shape.hidden, queries)}.items():
            yield f"blk.{block}.attn_{name}", size
        for name in ("gate", "up"):
            yield f"blk.{block}.ffn_{name}_exps", (shape.experts, shape.inner, shape.hidden)
        yield f"blk.{block}.ffn_down_exps", (shape.experts, shape.hidden, shape.inner)


def _packed(sizes: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return random blocks of Q4_0 (..., bytes of a row)."""
    groups = int(np.prod(sizes)) // _GROUP
    data = np.empty((groups, _BYTES), np.uint8)
    data[:, :2] = np.array([sizes[-1] ** -0.5 / _SPREAD], np.float16).view(np.uint8)
    data[:, 2:] = np.frombuffer(rng.bytes(groups * (_BYTES - 2)), np.uint8).reshape(groups, -1)
    return data.reshape(*sizes[:-1], -1)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(
        prog="python -m rankbook.tools.dev.mixture_gguf", description=__doc__.split("\n")[0]
    )
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--blocks", type=int, default=Shape.blocks, help=f"default: {Shape.blocks}")
    args = parser.parse_args(argv)
    if args.output.exists():
        print(f"{args.output} exists; name a new file", file=sys.stderr)
        return USAGE
    write(args.output, Shape(blocks=args.blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
