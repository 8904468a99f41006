"""``rankbook import``: a model that another tool has quantized to a checkpoint, without quantizing again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.checkpoint.output import check_replaceable
from rankbook.calibration.option import WHERE, argument, option, required
from rankbook.calibration.source import MANIFEST
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.errors import UsageError
from rankbook.tools.report import Table

if TYPE_CHECKING:
    from rankbook.calibration.imports.run import ImportReport


@dataclass(frozen=True, kw_only=True)
class Import(Common):
    """Options of the verb."""

    source: str = argument(
        "Hugging Face folder or id written by GPTQ, AWQ, AutoRound, LLM Compressor, ModelOpt or bitsandbytes, or in FP8"
        " or MXFP4; or a GGUF file",
        metavar="SOURCE",
        group=WHERE,
    )
    output: Path = required("folder for the checkpoint", metavar="DIR", flags=("-o", "--output"), group=WHERE)
    overwrite: bool = option(False, "replace an existing checkpoint", group=WHERE)


def run(options: Import) -> Outcome:
    """Import."""
    check_replaceable(options.output, MANIFEST)
    if (options.output / MANIFEST).is_file() and not options.overwrite:
        raise UsageError(
            f"{options.output} holds a checkpoint already; give another folder, or --overwrite to replace it"
        )
    import torch

    from rankbook.calibration.imports.run import import_model

    if options.threads:
        torch.set_num_threads(options.threads)
    report = import_model(options.source, options.output)
    summary = {"bits_per_weight": report.bits_per_weight, **report.to_json()}
    return Outcome(summary, [_table(report)], str(options.output), config_folder=options.output)


def _table(report: ImportReport) -> Table:
    from rankbook.calibration.checkpoint.card import spread

    specs = [layer.spec for layer in report.layers.values()]
    rows: list[tuple[str, object]] = [
        ("format", report.format),
        ("imported layers", len(report.layers)),
        ("stored bits per weight, linear layers", report.bits_per_weight),
        ("stored bits per weight, whole model", report.totals["model"]["bits_per_weight"]),
        *[(f"layers by {text}", spread(specs, name)) for name, text in {"bits": "bits", "group": "group"}.items()],
        ("weights of the blocks in float", f"{report.totals['blocks']['float_share']:.1%}"),
        ("weights of the model in float", f"{report.totals['model']['float_share']:.1%}"),
        ("seconds", report.seconds),
        ("peak memory, GB", report.peak_rss_bytes / 1e9),
    ]
    return Table("checkpoint", ("property", "value"), rows)


COMMAND = Command(
    name="import",
    summary="turn a model that another tool has quantized into a checkpoint, without rounding again",
    example="rankbook import model-gptq-int4 -o q",
    options=Import,
    run=run,
)
