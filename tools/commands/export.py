"""``rankbook export``: a checkpoint to one ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.model.hub import CodeOptions
from rankbook.calibration.option import WHERE, argument, option, required
from rankbook.exporter.options import ExportOptions
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import absolute
from rankbook.tools.report import Table, megabytes

_SHARE = {"trace": (0.0, 0.5), "write": (0.5, 0.9), "check": (0.9, 1.0)}
"""Part of the bar that each stage of the exporter takes."""


@dataclass(frozen=True, kw_only=True)
class Export(ExportOptions, CodeOptions, Common):
    """Options of the verb: those of the file, and where things are."""

    checkpoint: Path = argument(
        "folder written by `rankbook quantize`", metavar="CHECKPOINT", parse=absolute, group=WHERE
    )
    output: Path = required("folder for model.onnx and its data", metavar="DIR", flags=("-o", "--output"), group=WHERE)
    overwrite: bool = option(False, "replace an exported model that is already there", group=WHERE)


def run(options: Export) -> Outcome:
    """Export."""
    output: Path = options.output
    if (output / "model.onnx").is_file() and not options.overwrite:
        raise UsageError(f"{output} holds a model already; give another folder, or --overwrite to replace it")
    import torch

    from rankbook.exporter.export import export

    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(quiet=options.quiet)
    with console.progress("exporting") as show:

        def progress(stage: str, done: int, total: int) -> None:
            low, high = _SHARE.get(stage, (0.0, 1.0))
            show(low + (high - low) * done / max(1, total), stage)

        report = export(options.checkpoint, output, options, progress=progress)
    rows = [
        ("graph", megabytes(report.model_bytes)),
        ("data", megabytes(report.data_bytes)),
        ("  of which packed layers", megabytes(report.packed_bytes)),
        ("  of which everything else", megabytes(report.other_bytes)),
        ("packed layers", report.layers),
        ("stored bits per weight of these", report.bits_per_weight),
        ("activations, logits, dialect, opset", f"{report.dtype}, {report.logits}, {report.dialect}, {report.opset}"),
        ("nodes", sum(report.nodes.values())),
        ("ONNX Runtime GenAI", str(report.genai)),
        ("seconds", report.seconds),
    ]
    tables = [Table("model", ("property", "value"), rows)]
    if report.standard_attention:
        tables.append(_kept(report.standard_attention))
    return Outcome(report, tables, str(output / "model.onnx"), config_folder=output)


def _kept(layers: Mapping[str, str]) -> Table:
    """Say which layers of ``--graph ort`` have the attention of ``--graph standard``."""
    by_reason: dict[str, list[str]] = {}
    for number, why in layers.items():
        by_reason.setdefault(why, []).append(number)
    rows = [(", ".join(numbers), why) for why, numbers in by_reason.items()]
    return Table("layers with the standard attention; the cache does not grow in place", ("layers", "why"), rows)


COMMAND = Command(
    name="export",
    summary="export a checkpoint to one ONNX file that every runtime reads",
    example="rankbook export q -o onnx",
    options=Export,
    run=run,
)
