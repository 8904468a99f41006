"""``rankbook parity``: does an exported file compute what its checkpoint computes?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.option import WHERE, argument, option
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.evaluate.options import ParityOptions
from rankbook.tools.kernel_options import ExactKernelOptions
from rankbook.tools.report import Table, to_json

if TYPE_CHECKING:
    from rankbook.tools.evaluate.node_checks import LayerCheck
    from rankbook.tools.evaluate.parity import ParityReport


@dataclass(frozen=True, kw_only=True)
class Parity(ParityOptions, ExactKernelOptions, Common):
    """Options of the verb: those of the checks, and where things are."""

    model: Path = argument("exported folder or .onnx file", metavar="MODEL", group=WHERE)
    checkpoint: Path | None = option(
        None, "what it was exported from; found by itself if it is still there", metavar="DIR", group=WHERE
    )
    text: Path | None = option(
        None, "take the tokens from this text; random tokens without it", metavar="FILE", group=WHERE
    )
    output: Path | None = option(
        None, "also write the report to this JSON file", metavar="FILE", flags=("-o", "--output"), group=WHERE
    )


def run(options: Parity) -> Outcome:
    """Compare, report, decide."""
    from rankbook.tools.evaluate import parity

    with Console(quiet=options.quiet).progress("parity") as progress:
        report = parity.parity(
            options.model,
            options.checkpoint,
            options,
            kernels=options.chosen_kernels(),
            text=options.text,
            progress=progress,
        )
    folder = None
    if options.output is not None:
        folder = options.output.parent
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(options.output, to_json(report) + "\n")
    return Outcome(report, _tables(report), _verdict(report), passed=report.passed, config_folder=folder)


def _tables(report: ParityReport) -> list[Table]:
    whole = [
        (what, item.error, item.mean_error, _mark(item.passed))
        for what, item in (("logits", report.logits), ("logits, cached decoding", report.cached))
        if item is not None
    ]
    kinds = [
        (item.op_type, f"{item.shape[0]} x {item.shape[1]}", item.nodes, item.error, _mark(item.passed))
        for item in report.operators
    ]
    layers = [(item.name, item.error, _mark(item.passed)) for item in _worth_showing(report)]
    columns = ("operator", "N x K", "nodes", "error", "verdict")
    tables = [Table("torch and the exported file", ("what", "max error", "mean error", "verdict"), whole)]
    if kinds:
        tables.append(Table("the exported file and the numpy reference", columns, kinds))
    if layers:
        title = f"growth of the error over {len(report.layers)} layers"
        tables.append(Table(title, ("layer", "error", "verdict"), layers))
    if report.greedy:
        prompts = [
            (item.prompt, f"{item.same} of {item.tokens}", _of(item.generated, item.tokens), _mark(item.passed))
            for item in report.greedy
        ]
        heads = ("prompt", "both runtimes", "transformers' generate", "verdict")
        tables.append(Table("greedy tokens that agree", heads, prompts))
    return tables


def _of(part: int | None, whole: int) -> str:
    return "not compared" if part is None else f"{part} of {whole}"


def _worth_showing(report: ParityReport, most: int = 12) -> list[LayerCheck]:
    """A few layers evenly over the depth, and the first bad ones; the JSON report has all."""
    layers = list(report.layers)
    step = max(1, len(layers) // most)
    bad = [index for index, layer in enumerate(layers) if not layer.passed][:3]
    shown = sorted({*range(0, len(layers), step), *bad, len(layers) - 1} if layers else set())
    return [layers[index] for index in shown]


def _mark(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _verdict(report: ParityReport) -> str:
    lines = [f"structure: {problem}" for problem in report.problems]
    if report.top1_agreement is not None:
        lines.append(f"the most likely token is the same at {100 * report.top1_agreement:.1f} % of the positions")
    if report.first_bad_layer is not None and report.own_error is not None:
        own = report.own_error > report.tolerance
        where = "the layer itself is wrong" if own else "its input is already wrong: look before it"
        lines.append(
            f"first layer out of tolerance: {report.first_bad_layer}; {where} (own error {report.own_error:.2g})"
        )
    lines.append(f"{'parity' if report.passed else 'NO PARITY'} at tolerance {report.tolerance:g}")
    return "\n".join(lines)


COMMAND = Command(
    name="parity",
    summary="check an exported file against its checkpoint: whole, node by node, layer by layer",
    example="rankbook parity onnx --text text.txt --json",
    options=Parity,
    run=run,
)
