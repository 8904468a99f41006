"""``rankbook export``: a checkpoint to one ONNX file, or to a folder that vLLM serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.model.hub import CodeOptions
from rankbook.calibration.option import WHERE, argument, described, option, required
from rankbook.exporter.options import ExportOptions
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import absolute
from rankbook.tools.report import Table, megabytes

ONNX, COMPRESSED = "onnx", "compressed-tensors"
_KEPT = ("dtype", "weights_only")
"""Options of the file that other formats have too."""
_SHARE = {"trace": (0.0, 0.5), "write": (0.5, 0.9), "check": (0.9, 1.0)}
"""Part of the bar that each stage of the exporter takes."""


@dataclass(frozen=True, kw_only=True)
class Export(ExportOptions, CodeOptions, Common):
    """Options of the verb: those of the file, and where things are."""

    checkpoint: Path = argument(
        "folder written by `rankbook quantize`", metavar="CHECKPOINT", parse=absolute, group=WHERE
    )
    output: Path = required("folder for model.onnx and its data", metavar="DIR", flags=("-o", "--output"), group=WHERE)
    format: str = option(
        ONNX,
        "onnx, or a Hugging Face folder that transformers and vLLM read: compressed-tensors (integers of 4 or 8 bits;"
        " learned codebooks and error branches are refused), which takes --dtype and --weights-only only",
        choices=(ONNX, COMPRESSED),
        group=WHERE,
    )
    overwrite: bool = option(False, "replace an existing exported model", group=WHERE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == ONNX:
            return
        for item in described(ExportOptions):
            if item.name not in _KEPT and getattr(self, item.name) != item.default:
                flag = item.name.replace("_", "-")
                raise UsageError(f"--{flag} is about an ONNX file; leave it out of --format {self.format}")


def run(options: Export) -> Outcome:
    """Export."""
    output: Path = options.output
    if (output / ("model.onnx" if options.format == ONNX else "config.json")).is_file() and not options.overwrite:
        raise UsageError(f"{output} holds a model already; give another folder, or --overwrite to replace it")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    return _onnx(options) if options.format == ONNX else _compressed(options)


def _compressed(options: Export) -> Outcome:
    """Write a folder in the format compressed-tensors."""
    from rankbook.exporter.compressed_tensors import export_compressed_tensors
    from rankbook.exporter.export import DTYPES

    dtype = DTYPES[options.dtype]
    report = export_compressed_tensors(options.checkpoint, options.output, dtype, weights_only=options.weights_only)
    rows: list[tuple[str, object]] = [
        ("weights", megabytes(report.data_bytes)),
        *[(f"layers of {scheme}", count) for scheme, count in report.schemes.items()],
        ("written decoded", ", ".join(report.decoded) or "none"),
        ("everything else", report.dtype),
        ("seconds", report.seconds),
    ]
    return Outcome(report, [Table("model", ("property", "value"), rows)], report.folder, config_folder=options.output)


def _onnx(options: Export) -> Outcome:
    """Write an ONNX file."""
    from rankbook.exporter.export import export

    output: Path = options.output
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
    summary="export a checkpoint to one ONNX file, or to a folder for vLLM and transformers",
    example="rankbook export q -o onnx",
    options=Export,
    run=run,
)
