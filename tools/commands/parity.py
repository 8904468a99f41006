"""``rankbook parity``: does an exported file compute what its checkpoint computes, and an engine what its file does?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.model.hub import CodeOptions
from rankbook.calibration.option import WHERE, argument, option
from rankbook.calibration.source import Kind, identify
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.commands import parity_tables as tables
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.options import ParityOptions
from rankbook.tools.kernel_options import ExactKernelOptions
from rankbook.tools.report import to_json

if TYPE_CHECKING:
    from rankbook.tools.evaluate.engine_parity import EngineParityReport
    from rankbook.tools.evaluate.parity import ParityReport
    from rankbook.tools.report import Table

    Progress = Callable[[float, str], None]
    Result = tuple[ParityReport | EngineParityReport, list[Table], str]


@dataclass(frozen=True, kw_only=True)
class Parity(ParityOptions, ExactKernelOptions, CodeOptions, Common):
    """Options of the verb: those of the checks, and where things are."""

    model: Path = argument(
        "exported folder or .onnx file; or an engine folder, which is compared with the file that it was built from",
        metavar="MODEL",
        group=WHERE,
    )
    engine: Path | None = argument("engine folder to compare MODEL with", default=None, metavar="ENGINE", group=WHERE)
    checkpoint: Path | None = option(
        None, "checkpoint that MODEL was exported from; default: the path noted in MODEL", metavar="DIR", group=WHERE
    )
    text: Path | None = option(
        None, "text to take the tokens from; default: random tokens", metavar="FILE", group=WHERE
    )
    output: Path | None = option(
        None, "also write the report to this JSON file", metavar="FILE", flags=("-o", "--output"), group=WHERE
    )
    results: Path | None = option(
        None,
        "with an engine: save the compared outputs in polygraphy's format, for other thresholds later",
        metavar="FILE",
        group=WHERE,
    )


def run(options: Parity) -> Outcome:
    """Compare, report, decide."""
    with Console(quiet=options.quiet).progress("parity") as progress:
        report, shown, text = (_engine if _with_engine(options) else _file)(options, progress)
    folder = None
    if options.output is not None:
        folder = options.output.parent
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.output, to_json(report) + "\n")
    return Outcome(report, shown, text, passed=report.passed, config_folder=folder)


def _with_engine(options: Parity) -> bool:
    """Whether an engine takes part; what is nothing at all is named later, with what could be given."""
    try:
        found = options.engine is not None or identify(options.model).kind is Kind.ENGINE
    except ValueError:
        found = False
    if options.results is not None and not found:
        raise UsageError("--results saves the outputs of an engine; give an engine folder, or leave it out")
    if options.every_node and found:
        raise UsageError("--every-node checks the nodes of a file; leave the engine out, or the flag")
    return found


def _file(options: Parity, progress: Progress) -> Result:
    from rankbook.tools.evaluate.parity import parity

    report = parity(
        options.model,
        options.checkpoint,
        options,
        kernels=options.chosen_kernels(),
        text=options.text,
        progress=progress,
    )
    return report, tables.of_file(report), tables.verdict_of_file(report)


def _engine(options: Parity, progress: Progress) -> Result:
    from rankbook.tools.evaluate.engine_parity import Given, engine_parity

    given = Given(
        engine=options.engine or options.model,
        model=options.model if options.engine is not None else None,
        checkpoint=options.checkpoint,
        kernels=options.chosen_kernels(),
        text=options.text,
    )
    report = engine_parity(given, options, options.results, progress)
    return report, tables.of_engine(report), tables.verdict_of_engine(report)


COMMAND = Command(
    name="parity",
    summary="compare an exported file with its checkpoint, or an engine with its file, as a whole and layer by layer",
    example="rankbook parity onnx --text text.txt --json",
    options=Parity,
    run=run,
)
