"""``rankbook export``: a checkpoint to one ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rankbook.exporter import dialects
from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.report import Table, megabytes

_SHARE = {"trace": (0.0, 0.5), "write": (0.5, 0.9), "check": (0.9, 1.0)}
"""Part of the bar that each stage of the exporter takes."""


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add(
        "checkpoint", type=Path, metavar="CHECKPOINT", required=True, text="folder written by `rankbook quantize`"
    )
    flags.add("-o", "--output", type=Path, metavar="DIR", required=True, text="folder for model.onnx and its data")
    flags.add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", text="activations and unquantized weights")
    flags.add(
        "--logits", choices=("last", "all"), default="last", text="last is for generation, all for `rankbook eval`"
    )
    flags.add(
        "--dialect",
        choices=dialects.names(),
        default=dialects.NATIVE,
        text="operators of packed layers: rankbook (ours, any method), qdq (standard DequantizeLinear, which TensorRT"
        " fuses: symmetric 4 or 8 bits), ort (MatMulNBits of ONNX Runtime: affine 2 or 4 bits, symmetric 8)",
    )
    flags.add(
        "--activations",
        choices=("float", "int8"),
        default="float",
        text="int8: operators of packed layers round their input to 8 bits, with one scale per token and group",
    )
    flags.add(
        "--graph",
        choices=("standard", "ort"),
        default="standard",
        text="operators of everything else: standard (any runtime), or ort (ONNX Runtime's own attention and"
        " normalization: faster there)",
    )
    flags.add(
        "--inputs",
        choices=("ids", "embeds"),
        default="ids",
        text="token numbers, or embedded tokens (inputs_embeds) among which a vision tower may put its features",
    )
    flags.add(
        "--kv",
        choices=("float", "int8"),
        default="float",
        text="cache inputs and outputs: the type of the activations, or INT8 with a scale for each token and head",
    )
    flags.add(
        "--weights-only",
        action="store_true",
        default=False,
        text="leave out the checkpoint's --activations and --kv-bits",
    )
    flags.add("--overwrite", action="store_true", default=False, text="replace an exported model that is already there")


def run(options: argparse.Namespace) -> Outcome:
    """Export."""
    output: Path = options.output
    if (output / "model.onnx").is_file() and not options.overwrite:
        raise UsageError(f"{output} holds a model already; give another folder, or --overwrite to replace it")
    import torch

    from rankbook.exporter.export import ExportOptions, export

    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("dtype", "logits", "dialect", "activations", "graph", "kv", "inputs", "weights_only")
    chosen = ExportOptions(**{name: getattr(options, name) for name in names})
    # The resolved configuration tells `parity` where the checkpoint is, from any folder.
    options.checkpoint = options.checkpoint.resolve()
    console = Console(quiet=options.quiet)
    with console.progress("exporting") as show:

        def progress(stage: str, done: int, total: int) -> None:
            low, high = _SHARE.get(stage, (0.0, 1.0))
            show(low + (high - low) * done / max(1, total), stage)

        report = export(options.checkpoint, output, chosen, progress=progress)
    rows = [
        ("graph", megabytes(report.model_bytes)),
        ("data", megabytes(report.data_bytes)),
        ("  of which packed layers", megabytes(report.packed_bytes)),
        ("  of which everything else", megabytes(report.other_bytes)),
        ("packed layers", report.layers),
        ("stored bits per weight of these", report.bits_per_weight),
        ("activations, logits, dialect, opset", f"{report.dtype}, {report.logits}, {report.dialect}, {report.opset}"),
        ("nodes", sum(report.nodes.values())),
        ("seconds", report.seconds),
    ]
    return Outcome(
        report, [Table("model", ("property", "value"), rows)], str(output / "model.onnx"), config_folder=output
    )


COMMAND = Command(
    name="export",
    summary="export a checkpoint to one ONNX file that every runtime reads",
    example="rankbook export q -o onnx",
    add_flags=add_flags,
    run=run,
)
