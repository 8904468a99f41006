"""Measures memory and time by the size of the model: random Llama-shaped folders through quantize, eval and export.

    python -m rankbook.tools.dev.scale --sizes 0.1B 0.5B 1B --runs rtn lqer lcq-fast -o scale --document docs/scale.md

The weights are random (bf16, in shards), so accuracy means nothing; memory and time do not depend on it. Each verb is
a process of its own, whose peak of resident memory includes the pages of mapped files that happen to be there. Rows of
earlier runs in the same folder stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankbook.tools.child import package_environment, run_module
from rankbook.tools.errors import CHECK_FAILED

SIZES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "3B": {"hidden_size": 2560, "intermediate_size": 8960, "num_hidden_layers": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "16B": {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 35},
}
"""Shapes of Llama's kind, the last one of 30 GiB; ``--blocks`` cuts them short."""
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
_SLAB = 1 << 24
"""Random values that are made; larger tensors repeat them."""
_CALIB = ("--calib-sequences", "8", "--calib-length", "256")
_PAGE = f"""# Scale

Time and peak of resident memory by the size of the model, written by `python -m rankbook.tools.dev.scale`: random
weights in the shape of Llama (bf16, in shards of 1 GiB; a vocabulary of {_VOCABULARY}), `--memory-limit` as the table
says, calibration on 8 windows of 256 tokens, `eval` of 512 tokens in PyTorch. Peaks are what Linux calls VmHWM:
anonymous memory and resident pages of mapped files together. Where a model was cut to some of its blocks, the time for
all of it is extrapolated by weights. Seconds are those of the processor.

"""


@dataclass(frozen=True)
class Row:
    """One verb on one model.

    Attributes:
        size: Name of the shape.
        blocks: Blocks that the folder has.
        weights: Parameters of the folder.
        verb: The verb, with what it was given.
        seconds: Wall time of the process.
        cpu_seconds: Processor time of it.
        peak_rss_bytes: Its peak of resident memory.
        files_bytes: Size of the weights that it read.
        limit: What it was given as limit of memory; empty for none.
    """

    size: str
    blocks: int
    weights: int
    verb: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    files_bytes: int
    limit: str = ""


def shapes_of(shape: dict[str, int], blocks: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of a model and the shapes of its tensors by name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {**shape, "num_hidden_layers": blocks or shape["num_hidden_layers"]}
    heads = settings["hidden_size"] // _HEAD
    config = LlamaConfig(vocab_size=_VOCABULARY, num_attention_heads=heads, num_key_value_heads=heads, **settings)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        return config, {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}


def write_model(folder: Path, shape: dict[str, int], blocks: int | None = None) -> int:
    """Write a folder of random bf16 weights, one shard after the other; return the number of parameters."""
    import torch
    from safetensors.torch import save_file

    config, shapes = shapes_of(shape, blocks)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    largest = max(size.numel() for size in shapes.values())
    slab = torch.randn(min(_SLAB, largest), generator=torch.Generator().manual_seed(0))
    slab = (slab * shape["hidden_size"] ** -0.5).to(torch.bfloat16).repeat(-(-largest // len(slab)) + 1)
    index: dict[str, str] = {}
    waiting: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(waiting, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(waiting, name))
        waiting.clear()

    for number, (name, size) in enumerate(shapes.items()):
        begin = 4097 * number % (len(slab) - size.numel() + 1)
        plain = torch.ones(size, dtype=slab.dtype) if len(size) == 1 else slab[begin : begin + size.numel()].view(size)
        waiting[name] = plain.clone()
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


class Measured:
    """One model on disk, and the rows that are measured with it."""

    def __init__(self, size: str, work: Path, blocks: int | None, limit: str) -> None:
        """Write the model."""
        self.size, self._work, self._limit = size, work, limit
        self.model, self.text = work / size, work / "text.txt"
        self._weights = write_model(self.model, SIZES[size], blocks)
        self._read = sum(path.stat().st_size for path in self.model.glob("*.safetensors"))
        self._blocks = json.loads((self.model / "config.json").read_text())["num_hidden_layers"]
        self.rows: list[Row] = []

    def note(self, verb: str, seconds: float, cpu: float, peak: int, limit: str = "") -> None:
        """Add a row."""
        self.rows.append(Row(self.size, self._blocks, self._weights, verb, seconds, cpu, peak, self._read, limit))
        print(json.dumps(asdict(self.rows[-1])), file=sys.stderr)

    def verb(self, name: str, *words: object, limit: bool = True) -> None:
        """Run a verb to its end.

        Raises:
            RuntimeError: It failed; its last lines.
        """
        given = [*map(str, words), *(("--memory-limit", self._limit) if limit else ()), "--quiet", "--json"]
        done = run_module("rankbook.tools.cli", given, log=self._work / f"{self.size}.log")
        if done.code:
            raise RuntimeError(f"{name}: {done.message}")
        held = self._limit if limit else ""
        self.note(name, done.seconds, done.cpu_seconds, done.peak_rss_bytes, held)

    def run(self, run: str, more: Sequence[str]) -> None:
        """Take the model through a method, `eval` and `export`; what is finished is removed to save the disk."""
        out, label = self._work / f"{self.size}-{run}", " ".join([run, *(word for word in more if "=" in word)])
        calib = ["--calib", self.text, *_CALIB]
        self.verb(f"quantize {label}", "quantize", self.model, *RUNS[run], *calib, "-o", out, *more)
        threads = more[: 2 * (more[:1] == ["--threads"])]
        asked = ["--text", self.text, "--context", 256, "--max-tokens", 512, "--batch", 2]
        self.verb(f"eval {run}", "eval", out, *asked, *threads)
        self.verb(f"export {run}", "export", out, "-o", self._work / "onnx", *threads, limit=False)
        for folder in (out, self._work / "onnx"):
            shutil.rmtree(folder)

    def killed(self, finished: int) -> None:
        """Quantize until some blocks are finished, kill it there, and resume until there is one more."""
        out = self._work / f"{self.size}-killed"
        words = ["quantize", self.model, *RUNS["rtn"], "-o", out, "--memory-limit", self._limit, "--quiet", "--json"]
        try:
            for blocks, also, what in ((finished, (), "killed after"), (finished + 1, ("--resume",), "resumed to")):
                begin = time.monotonic()
                cpu, peak = _until(out.with_name(f".{out.name}.partial"), blocks, [*map(str, words), *also])
                self.note(f"quantize rtn, {what} {blocks} blocks", time.monotonic() - begin, cpu, peak, self._limit)
        finally:
            shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
            out.with_name(f".{out.name}.rankbook-lock").unlink(missing_ok=True)


def _until(state: Path, blocks: int, words: Sequence[str]) -> tuple[float, int]:
    """Run a verb until some blocks are in its state, and kill it; return its processor time and its peak of memory.

    Raises:
        RuntimeError: It ended before.
    """
    command = [sys.executable, "-m", "rankbook.tools.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=package_environment()) as process:
        last = state / f"block-{blocks - 1:05d}.safetensors"
        try:
            while not last.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"{words[0]} ended with {process.returncode} before {last.name} was there")
                time.sleep(0.01)
            status = Path(f"/proc/{process.pid}/status").read_text()
            times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        finally:
            process.kill()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return (int(times[11]) + int(times[12])) / _TICKS, peak * 1024


_TICKS = 100
"""Of the clock in which Linux counts the time of a process, a second."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["0.1B", "0.5B"])
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=["rtn", "lqer", "lcq-fast"])
    parser.add_argument("--blocks", type=int, help="blocks of each model, for sizes that would take too long")
    parser.add_argument("--steps", type=int, help="training steps of lcq, for sizes that would take too long")
    parser.add_argument("--kill-after", type=int, metavar="N", help="also kill a run after N blocks, and resume it")
    parser.add_argument("--memory-limit", default="4GiB", metavar="SIZE")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--document", type=Path, help="write the table of all rows into this file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder for models, and for rows.json")
    given = parser.parse_args(words)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2000)
    kept = given.output / "rows.json"
    rows = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    for size in given.sizes:
        model = Measured(size, given.output, given.blocks, given.memory_limit)
        try:
            if given.kill_after:
                model.killed(given.kill_after)
            for run in given.runs:
                steps = ["--method-option", f"steps={given.steps}"] if given.steps and run == "lcq" else []
                model.run(run, ["--threads", given.threads, *steps])
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return CHECK_FAILED
        finally:
            rows += model.rows
            kept.write_text(json.dumps([asdict(row) for row in rows], indent=1))
            shutil.rmtree(model.model)
    if given.document:
        given.document.write_text(f"{_PAGE}{table(rows)}\n\n{unmeasured(rows)}\n")
    print(table(rows))
    return 0


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, with the time for a whole model and by a billion parameters."""
    lines = ["| model | weights, GB | verb | limit | peak, GB | CPU s | CPU s per billion | CPU s, all blocks |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        whole = sum(size.numel() for size in shapes_of(SIZES[row.size])[1].values())
        all_blocks, cut = SIZES[row.size]["num_hidden_layers"], row.blocks < SIZES[row.size]["num_hidden_layers"]
        part = f", {row.blocks} of {all_blocks} blocks" if cut else ""
        stopped = "after" in row.verb or "resumed" in row.verb
        each = "" if stopped else f"{row.cpu_seconds / row.weights * 1e9:.0f}"
        total = "" if stopped else f"{row.cpu_seconds * whole / row.weights:.0f}{' (extrapolated)' if cut else ''}"
        lines.append(
            f"| {row.size}{part} | {row.files_bytes / 1e9:.2f} | {row.verb} | {row.limit or 'none'} |"
            f" {row.peak_rss_bytes / 1e9:.2f} | {row.cpu_seconds:.0f} | {each} | {total} |"
        )
    return "\n".join(lines)


def unmeasured(rows: Sequence[Row]) -> str:
    """Say which sizes were not quantized by each run."""
    done = {(row.size, row.verb.split()[1].rstrip(",")) for row in rows if row.verb.startswith("quantize")}
    missing = {run: [size for size in SIZES if (size, run) not in done] for run in RUNS}
    said = "; ".join(f"{run}: {', '.join(sizes)}" for run, sizes in missing.items() if sizes)
    return f"**Not measured**: {said}." if said else "All sizes were measured with all of these runs."


if __name__ == "__main__":
    sys.exit(main())
