"""The accuracy table of the README: many ways to quantize one model, each judged by its outputs.

    python -m rankbook.tools.dev.accuracy MODEL --calib calib.txt --text eval.txt --output accuracy

Every row is one ``rankbook quantize`` in a child process (so that seconds and peak memory are its own) and one
``rankbook eval`` on the same tokens. *Gap closed* is the share of the log-perplexity gap between the unquantized model
and min-max RTN at the same bits and group size that a row closes. Finished rows are kept: a second call goes on. Rows
of other projects (see `peers`) run in the interpreter named with ``--peer-python``, where their packages are installed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankbook.tools.child import Finished, run_module
from rankbook.tools.report import Table, to_json

ROWS: Mapping[str, Sequence[str]] = {
    "RTN": ("--method", "rtn"),
    "RTN, clip search": ("--method", "rtn", "--clip-search"),
    "L2QER on RTN, rank 32": ("--method", "rtn", "--error-branch", "l2qer", "--error-rank", "32"),
    "GPTQ, activation order": ("--method", "gptq", "--clip-search"),
    "AWQ": ("--method", "awq"),
    "LRQ": ("--method", "lrq"),
    "NF4": ("--method", "rtn", "--method-option", "format=nf4"),
    "LCQ rank 1, closed form": ("--method", "lcq", "--rank", "1", "--effort", "fast"),
    "LCQ rank 2, closed form": ("--method", "lcq", "--rank", "2", "--effort", "fast"),
    "LCQ rank 1": ("--method", "lcq", "--rank", "1"),
    "LCQ rank 1, group 48": ("--method", "lcq", "--rank", "1", "--group-size", "48"),
    "LCQ rank 2": ("--method", "lcq", "--rank", "2"),
    "LCQ rank 2 + QERA rank 32": ("--method", "lcq", "--rank", "2", "--error-branch", "qera", "--error-rank", "32"),
}
"""Flags of ``rankbook quantize`` by row; bits and, where a row has none of its own, group size come from the caller."""
PEER_ROWS: Mapping[str, Sequence[str]] = {
    "AutoRound, 50 iterations": ("auto-round", "--iterations", "50"),
    "AutoRound, 200 iterations": ("auto-round", "--iterations", "200"),
    "HQQ": ("hqq",),
    "GPTQ of LLM Compressor": ("llm-compressor-gptq",),
    "AWQ of LLM Compressor": ("llm-compressor-awq",),
}
"""Arguments of ``python -m rankbook.tools.dev.peers`` by row."""
BASELINE = "RTN"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows asked for and write ``accuracy.json`` and ``accuracy.md``."""
    args = _parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    results_file = args.output / "accuracy.json"
    results: dict[str, Any] = json.loads(results_file.read_text()) if results_file.exists() else {}
    if "unquantized" not in results:
        results["unquantized"] = _evaluate(args.model, args)
    for bits in args.bits:
        for name in args.rows or ROWS:
            key = f"{bits} bits, group {args.group_size}: {name}"
            if key not in results:
                print(key, file=sys.stderr)
                results[key] = {"bits": bits, "name": name} | _measure(bits, name, args)
                _write(results_file, to_json(results))
                _write(args.output / "accuracy.md", table(results).markdown() + "\n")
    table(results).show(sys.stdout)
    return 0


def table(results: Mapping[str, Any]) -> Table:
    """Build the table; rows whose baseline is missing have no gap closed."""
    full = math.log(results["unquantized"]["perplexity"])
    rows: list[tuple[object, ...]] = [("unquantized", "", results["unquantized"]["perplexity"], None, *[""] * 5)]
    for key, row in results.items():
        if key == "unquantized":
            continue
        base = next((r for r in results.values() if r.get("name") == BASELINE and r.get("bits") == row["bits"]), None)
        closed = ""
        if base is not None:
            gap = math.log(base["perplexity"]) - full
            closed = f"{100 * (1 - (math.log(row['perplexity']) - full) / gap):.1f} %"
        rows.append(
            (
                key,
                f"{row['bits_per_weight']:.3f}",
                f"{row['perplexity']:.2f}",
                closed,
                f"{row['kl']:.4f}",
                f"{100 * row['top1_agreement']:.1f} %",
                f"{row['quantize_seconds']:.0f}",
                f"{row['quantize_cpu_seconds']:.0f}" if "quantize_cpu_seconds" in row else "",
                f"{row['peak_rss_bytes'] / 2**30:.2f}",
            )
        )
    columns = (
        "method",
        "stored bits",
        "perplexity",
        "gap closed",
        "KL",
        "top-1",
        "seconds",
        "CPU seconds",
        "peak RSS GiB",
    )
    return Table("", columns, rows)


def _measure(bits: int, name: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        checkpoint = Path(folder) / "checkpoint"
        common = ["--bits", str(bits), "--group-size", str(args.group_size), "--calib", str(args.calib)]
        common += ["--calib-sequences", str(args.calib_sequences), "--seed", str(args.seed), "-o", str(checkpoint)]
        if name in PEER_ROWS:
            peer, *flags = PEER_ROWS[name]
            words = [peer, str(args.model), *common, *flags]
            done = _run("rankbook.tools.dev.peers", words, args, python=args.peer_python)
        else:
            words = ["quantize", str(args.model), *common, *ROWS[name], "--json"]
            done = _run("rankbook.tools", words, args)
        result = _evaluate(checkpoint, args, reference=args.model)
    result |= {
        "bits_per_weight": done.report["bits_per_weight"],
        "quantize_seconds": done.seconds,
        "quantize_cpu_seconds": done.cpu_seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
        "command": " ".join(words),
    }
    return result


def _evaluate(model: Path, args: argparse.Namespace, reference: Path | None = None) -> dict[str, Any]:
    command = ["eval", str(model), "--text", str(args.text), "--context", str(args.context)]
    command += ["--max-tokens", str(args.max_tokens)]
    if reference is not None:
        command += ["--reference", str(reference)]
    report: dict[str, Any] = _run("rankbook.tools", [*command, "--json"], args).report
    return report


def _run(module: str, words: Sequence[str], args: argparse.Namespace, python: str = sys.executable) -> Finished:
    log = args.output / "accuracy.log"
    done = run_module(module, words, python=python, log=log)
    if done.code or done.report is None:
        raise SystemExit(f"{module} {' '.join(words)} ended with {done.code}: {done.message}; see {log}")
    return done


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rankbook.tools.dev.accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument("--calib", type=Path, required=True, help="calibration text")
    parser.add_argument("--text", type=Path, required=True, help="evaluation text, disjoint from the calibration text")
    parser.add_argument("--output", type=Path, default=Path("accuracy"), help="folder of results (default: accuracy)")
    parser.add_argument("--bits", type=int, nargs="+", default=[3], help="bits per code (default: 3)")
    parser.add_argument("--group-size", type=int, default=64, help="weights per group (default: 64)")
    parser.add_argument(
        "--rows", nargs="+", choices=sorted([*ROWS, *PEER_ROWS]), help="rows to measure (default: those of rankbook)"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers (default: this one)")
    parser.add_argument("--context", type=int, default=512, help="tokens per evaluation window (default: 512)")
    parser.add_argument("--max-tokens", type=int, default=20480, help="evaluation tokens (default: 20480)")
    parser.add_argument("--seed", type=int, default=0, help="seed of quantization (default: 0)")
    parser.add_argument("--calib-sequences", type=int, default=32, help="calibration windows (default: 32)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
