"""Measures memory and time by the size of the model: random Llama-shaped folders through quantize, eval and export.

    python -m rankbook.tools.dev.scale --sizes 0.1B 0.5B 1B --runs rtn lqer lcq-fast -o scale

The weights are random (bf16, in shards), so accuracy means nothing; memory and time do not depend on it. Each verb is
a process of its own, whose peak of resident memory includes the pages of mapped files that happen to be there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankbook.tools.child import run_module
from rankbook.tools.errors import CHECK_FAILED

SIZES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "3B": {"hidden_size": 2560, "intermediate_size": 8960, "num_hidden_layers": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}
"""Shapes of Llama's kind; ``--blocks`` cuts the last ones short."""
RUNS: dict[str, list[str]] = {
    "rtn": ["--method", "rtn", "--bits", "4"],
    "lqer": ["--method", "lqer", "--bits", "4"],
    "lcq-fast": ["--method", "lcq", "--bits", "3", "--effort", "fast"],
    "lcq": ["--method", "lcq", "--bits", "3"],
}
"""What `quantize` is given."""
_HEAD = 128
_VOCABULARY = 32_000
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One verb on one model.

    Attributes:
        size: Name of the shape.
        blocks: Blocks that the folder has.
        weights: Parameters of the folder.
        verb: The verb, with what it was given.
        seconds: Wall time of the process.
        peak_rss_bytes: Its peak of resident memory.
        files_bytes: Size of the weights that it read.
    """

    size: str
    blocks: int
    weights: int
    verb: str
    seconds: float
    peak_rss_bytes: int
    files_bytes: int


def write_model(folder: Path, shape: dict[str, int], blocks: int | None = None) -> int:
    """Write a folder of random bf16 weights, one shard after the other; return the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {**shape, "num_hidden_layers": blocks or shape["num_hidden_layers"]}
    heads = settings["hidden_size"] // _HEAD
    config = LlamaConfig(vocab_size=_VOCABULARY, num_attention_heads=heads, num_key_value_heads=heads, **settings)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, str] = {}
    waiting: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(waiting, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for name, size in shapes.items():
        plain = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * size[-1] ** -0.5
        waiting[name] = plain.to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in waiting.values()) > _SHARD_BYTES:
            flush()
    if waiting:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(size.numel() for size in shapes.values())


def _tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=plain)


def measure(size: str, runs: Sequence[str], work: Path, *, blocks: int | None, more: Sequence[str]) -> list[Row]:
    """Take one model through every run, `eval` and `export`; what is finished is removed to save the disk.

    Raises:
        RuntimeError: A verb failed; its last lines.
    """
    model, text = work / size, work / "text.txt"
    weights = write_model(model, SIZES[size], blocks)
    read = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    rows = []

    def verb(name: str, *words: object) -> None:
        done = run_module("rankbook.tools.cli", [*map(str, words), "--quiet", "--json"], log=work / f"{size}.log")
        if done.code:
            raise RuntimeError(f"{name}: {done.message}")
        held = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        rows.append(Row(size, held, weights, name, done.seconds, done.peak_rss_bytes, read))
        print(json.dumps(asdict(rows[-1])), file=sys.stderr)

    for run in runs:
        out = work / f"{size}-{run}"
        calib = ["--calib", text, "--calib-sequences", 8, "--calib-length", 256]
        verb(f"quantize {run}", "quantize", model, *RUNS[run], *calib, "-o", out, *more)
        verb(f"eval {run}", "eval", out, "--text", text, "--context", 256, "--max-tokens", 1024)
        verb(f"export {run}", "export", out, "-o", work / "onnx")
        for folder in (out, work / "onnx"):
            shutil.rmtree(folder)
    shutil.rmtree(model)
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.1B", "0.5B"])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["rtn", "lqer", "lcq-fast"])
    parser.add_argument("--blocks", type=int, help="blocks of each model, for sizes that would take too long")
    parser.add_argument("--threads", default="2")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder: models, and rows.json")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True)
    (given.output / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    rows: list[Row] = []
    try:
        for size in given.sizes:
            rows += measure(size, given.runs, given.output, blocks=given.blocks, more=["--threads", given.threads])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return CHECK_FAILED
    finally:
        (given.output / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))
    return 0


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, with time and memory per billion parameters."""
    lines = ["| model | verb | seconds | s per billion | peak, GB | weights read, GB |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.size}, {row.blocks} blocks | {row.verb} | {row.seconds:.0f} | {row.seconds / row.weights * 1e9:.0f} |"
        f" {row.peak_rss_bytes / 1e9:.2f} | {row.files_bytes / 1e9:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
