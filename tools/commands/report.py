"""``rankbook report``: what runs say about themselves, side by side, as one HTML file that needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.option import argument, option
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.report import Table, megabytes

_ENDS = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Options of the verb."""

    runs: tuple[Path, ...] = argument(
        "checkpoints, exported folders, engine folders, JSON of eval, parity, bench or the demo; or folders that"
        " contain them",
        metavar="RUN",
    )
    output: Path = option(Path("report.html"), "HTML file to write", metavar="FILE", flags=("-o", "--output"))
    title: str = option("Rankbook report", "heading of the page", metavar="TEXT")
    looks: int = option(
        3, "layers of each checkpoint for which codebooks and the error spectrum are drawn", metavar="N", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix not in _ENDS:
            raise UsageError(f"--output {self.output}: the page is HTML; give a name that ends in {' or '.join(_ENDS)}")


def run(options: Report) -> Outcome:
    """Read, draw, write."""
    from rankbook.tools.page.figures import unavailable
    from rankbook.tools.page.page import make_page

    if reason := unavailable():
        raise MissingError(reason)
    with Console(quiet=options.quiet).progress("report"):
        page = make_page(options.runs, options.title, options.looks)
        text = page.html()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.output, text)
    rows = [(section.title, len(section.blocks), "; ".join(section.missing)) for section in page.sections]
    table = Table(page.summary, ("section", "parts", "missing"), rows)
    report = {**page.report(), "output": options.output, "bytes": len(text.encode())}
    return Outcome(report, [table], f"{options.output}: {megabytes(report['bytes'])}")


COMMAND = Command(
    name="report",
    summary="write one HTML page that compares runs: accuracy, errors, bytes, speed, parity, commands",
    example="rankbook report model-3bit model-onnx eval.json parity.json bench -o report.html",
    options=Report,
    run=run,
)
