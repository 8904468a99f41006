"""``rankbook quantize``: a model to a low-bit checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.settings import ACTIVATIONS, ALLOCATED, KV_BITS, RANGES
from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.report import Table

if TYPE_CHECKING:
    from rankbook.calibration.model.options import QuantizeOptions
    from rankbook.calibration.model.report import Progress, QuantizeReport

_OPTIONS = (
    "method bits target_bits allocate rank group_size weight_format clip_search error_branch error_rank factor_bits"
    " param_bits level_dtype effort branch_passes scale_inputs scale_strength calib calib_sequences calib_length seed"
    " quantize_lm_head quantize_embeddings activations activation_range activation_skip"
    " activation_training kv_bits allow_partial"
).split()
"""Flags that go to `QuantizeOptions` under their own names."""


def group_size(text: str) -> int | str:
    """Parse ``--group-size``: a number, ``auto`` or ``channel``."""
    if text in ("auto", "channel"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a group size; give a number, auto or channel") from None


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add(
        "model", metavar="MODEL", required=True, text="Hugging Face folder or id, folder with one GGUF, .gguf file"
    )
    flags.add("-o", "--output", type=Path, metavar="DIR", required=True, text="folder for the checkpoint")
    _add_method_flags(flags)
    flags.add("--calib", metavar="FILE", text=".txt, .jsonl or a datasets name; sampled from the model without it")
    flags.add("--calib-sequences", type=int, default=64, metavar="N", text="calibration windows")
    flags.add("--calib-length", type=int, default=512, metavar="N", text="tokens per calibration window")
    flags.add(
        "--quantize-lm-head",
        type=int,
        choices=(0, 4, 8),
        default=0,
        text="bits of the output layer, 4 fitted to its inputs; 0 leaves it",
    )
    flags.add(
        "--quantize-embeddings", type=int, choices=(0, 4, 8), default=0, text="bits of the embedding; 0 leaves it"
    )
    flags.add(
        "--activations",
        choices=ACTIVATIONS,
        default="none",
        text="inputs of packed layers: static8 (INT8, one step a tensor, exported as QuantizeLinear), token8 (one range"
        " a token), mxint8 and mxint6 (blocks of 16); the dynamic ones are for evaluation in PyTorch",
    )
    flags.add(
        "--activation-range",
        choices=RANGES,
        default="mse",
        text="how static ranges are chosen from the calibration text",
    )
    flags.add(
        "--activation-skip",
        nargs="+",
        default=(),
        metavar="NAME",
        text="layers whose inputs are left alone, e.g. *.down_proj, whose outliers one step does not fit",
    )
    flags.add(
        "--activation-training",
        action=argparse.BooleanOptionalAction,
        text="train blocks with their inputs quantized too (straight-through gradients); by itself with static8 alone",
    )
    flags.add(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        default=0,
        text="keys and values per token and head, before the rotary embedding, in PyTorch; 0 leaves them",
    )
    flags.add("--skip", nargs="+", default=(), metavar="NAME", text="layers to leave alone; * and ? are wildcards")
    flags.add(
        "--allow-partial",
        action="store_true",
        default=False,
        text="quantize a model of whose blocks less than half of the weights can be quantized (experts stay in float)",
    )
    flags.add("--resume", action="store_true", default=False, text="go on at the last finished block of an earlier run")
    flags.add("--overwrite", action="store_true", default=False, text="replace a checkpoint that is already there")


def _add_method_flags(flags: Flags) -> None:
    flags.add(
        "--method",
        default="lcq",
        metavar="M",
        text="lcq, lrq, lqer, flexround, rtn, gptq, awq, omniquant or smoothquant (each a file in calibration/methods)",
    )
    flags.add("--bits", type=int, choices=(2, 3, 4, 8), default=3, text="bits of a code")
    flags.add(
        "--target-bits", type=float, metavar="B", text="stored bits per weight: choose what each layer gets (scipy)"
    )
    flags.add(
        "--allocate",
        nargs="+",
        choices=ALLOCATED,
        default=("bits",),
        text="what --target-bits chooses: bits, rank (planes of lcq up to --rank), branch (up to --error-rank)",
    )
    flags.add(
        "--rank",
        type=int,
        metavar="R",
        text="rank: of the codebook matrix (lcq), 1 to 2^bits - 1; of the scaling matrices (lrq)",
    )
    flags.add(
        "--group-size", type=group_size, default="auto", metavar="G", text="weights per codebook: number, auto, channel"
    )
    flags.add("--weight-format", metavar="F", text="fixed levels: affine, symmetric, nf4 or mxint (lrq: the first two)")
    flags.add("--clip-search", action=argparse.BooleanOptionalAction, text="search the clipping range (fixed levels)")
    flags.add("--error-branch", metavar="E", text="low-rank branch: none, lqer, l2qer, qera-diag or qera")
    flags.add("--error-rank", type=int, default=32, metavar="Q", text="rank of the error branch")
    flags.add("--factor-bits", type=int, choices=(8, 16), default=8, text="bits of the branch's factors")
    flags.add(
        "--branch-passes", type=int, default=1, metavar="N", text="rounds of quantizing around the branch and refitting"
    )
    flags.add("--scale-inputs", metavar="S", text="hide input scales in norms first: none, awq or smoothquant")
    flags.add("--scale-strength", type=float, default=0.5, metavar="A", text="smoothquant's alpha, 0 to 1")
    flags.add(
        "--param-bits", type=int, choices=(8, 16), text="bits of each number of a group; the method's choice without"
    )
    flags.add(
        "--level-dtype", choices=("int8", "float16"), text="storage of learned levels; the method's choice without"
    )
    flags.add("--effort", choices=("fast", "default", "high"), text="fast is the closed form alone; high trains longer")
    flags.add("--method-option", nargs="+", default=(), metavar="KEY=VALUE", text="further options of the method")


def run(options: argparse.Namespace) -> Outcome:
    """Quantize."""
    from rankbook.calibration.checkpoint.files import check_replaceable
    from rankbook.calibration.checkpoint.format import MANIFEST

    output: Path = options.output
    check_replaceable(output, MANIFEST)
    if (output / MANIFEST).is_file() and not (options.overwrite or options.resume):
        raise UsageError(f"{output} holds a checkpoint already; give another folder, or --overwrite to replace it")
    import torch

    from rankbook.calibration.model.driver import quantize_model

    if options.threads:
        torch.set_num_threads(options.threads)
    chosen = _quantize_options(options)
    console = Console(quiet=options.quiet)
    width = f"{chosen.bits} bits" if chosen.target_bits is None else f"{chosen.target_bits} stored bits"
    with console.progress(f"quantizing with {chosen.method} at {width}") as show:

        def progress(step: Progress) -> None:
            where = f"block {step.block + 1}/{step.blocks}, " if step.block >= 0 else ""
            show(step.fraction, f"{where}{step.stage}")

        report = quantize_model(options.model, output, chosen, resume=options.resume, progress=progress)
    if chosen.calib is None:
        console.log("calibrated on text sampled from the model itself; --calib FILE with text of your use fits better")
    if report.unknown:
        console.log(report.unknown)
    summary = {"bits_per_weight": report.bits_per_weight, "method": chosen.method, **report.to_json()}
    return Outcome(summary, _tables(report), str(output), config_folder=output)


def _quantize_options(options: argparse.Namespace) -> QuantizeOptions:
    from rankbook.calibration.model.options import QuantizeOptions

    values: dict[str, Any] = {name: getattr(options, name) for name in _OPTIONS}
    extra = dict(_parse_option(item) for item in options.method_option)
    values |= {name: tuple(getattr(options, name)) for name in ("skip", "activation_skip", "allocate")}
    return QuantizeOptions(**values, method_options=extra)


def _parse_option(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--method-option {text!r} has no value; write KEY=VALUE")
    return name.replace("-", "_"), yaml.safe_load(value)


def _tables(report: QuantizeReport) -> list[Table]:
    linear = report.totals["linear"]
    rows: list[tuple[str, object]] = [
        ("quantized layers", len(report.layers)),
        ("weights in linear layers", linear["weights"]),
        ("stored bits per weight, linear layers", linear["bits_per_weight"]),
    ]
    rows += [(f"  of which {part}", bits / linear["weights"]) for part, bits in linear["parts"].items()]
    for name in ("embeddings", "lm_head", "model"):
        if entry := report.totals.get(name):
            what = "whole model" if name == "model" else name
            rows.append((f"stored bits per weight, {what}", entry.get("bits_per_weight", "shared with the embedding")))
    for name, what in (
        ("blocks", "weights of the blocks left in float"),
        ("model", "weights of the model left in float"),
    ):
        rows.append((what, f"{report.totals[name]['float_share']:.1%}"))
    errors = [layer.error for layer in report.layers.values() if layer.error is not None]
    if errors:
        rows.append(("relative output error, mean over layers", sum(errors) / len(errors)))
    rows += [
        ("calibration", report.calibration),
        ("layers left alone", len(report.left_alone)),
        ("layers with scaled inputs", len(report.scaled)),
        *[(f"layers by {text}", counts) for text, name in _COUNTED if (counts := _count(report, name))],
        ("seconds", report.seconds),
        ("peak memory, GB", report.peak_rss_bytes / 1e9),
    ]
    if report.resumed_at:
        rows.append(("resumed after block", report.resumed_at))
    return [Table("checkpoint", ("property", "value"), rows)]


_COUNTED = (("bits", "bits"), ("planes", "planes"), ("rank of the error branch", "rank"))
"""Properties of a layer that `LayerMeta` holds, by what they are called in the table."""


def _count(report: QuantizeReport, name: str) -> str:
    """Say how many layers have each value of a property; empty where none has any."""
    values = sorted(getattr(layer.meta, name) for layer in report.layers.values())
    return ", ".join(f"{values.count(value)} of {value}" for value in sorted(set(values))) if any(values) else ""


COMMAND = Command(
    name="quantize",
    summary="quantize a model to a low-bit checkpoint",
    example="rankbook quantize MODEL --method lcq --bits 3 --rank 2 --group-size 64 --calib text.txt -o q",
    add_flags=add_flags,
    run=run,
)
