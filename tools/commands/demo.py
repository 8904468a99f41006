"""``rankbook demo``: everything on one small model."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.checkpoint.output import locked
from rankbook.tools import demo
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console


@dataclass(frozen=True, kw_only=True)
class Demo(demo.DemoOptions, Common):
    """Options of the verb."""


def run(options: Demo) -> Outcome:
    """Run the stages one after another, each in a process of its own."""
    console = Console(quiet=options.quiet)
    with locked(options.output), console.progress("demo") as progress:
        prepared = demo.prepare(options)

        def note(fraction: float, what: str) -> None:
            progress(fraction, what)
            if not console.bars:
                console.log(f"  {what}")

        report = demo.run(prepared, note)
    lines = [f"> {report['generated']}", report["note"], f"{options.output / 'report.html'}"]
    return Outcome(report, demo.tables(report), "\n".join(lines), report["passed"], options.output)


COMMAND = Command(
    name="demo",
    summary="quantize, export, run, check and build SmolLM2-135M, and write a report on it",
    example="rankbook demo -o demo",
    options=Demo,
    run=run,
)
