"""``rankbook quantize``: a model to a low-bit checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.output import check_replaceable
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.presets import PRESETS, with_preset
from rankbook.calibration.model.hub import HubOptions, at_revision
from rankbook.calibration.notes import note
from rankbook.calibration.option import WHAT, WHERE, argument, option, part, required
from rankbook.calibration.source import MANIFEST
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.report import Table, duration, megabytes

if TYPE_CHECKING:
    from rankbook.calibration.driver.report import Plan, Progress, QuantizeReport


@dataclass(frozen=True, kw_only=True)
class Quantize(QuantizeOptions, HubOptions, Common):
    """Options of the verb: those of quantization, and where things are."""

    model: str = argument(
        "Hugging Face folder or id, folder with one GGUF file, or .gguf file", metavar="MODEL", group=WHERE
    )
    output: Path = required("folder for the checkpoint", metavar="DIR", flags=("-o", "--output"), group=WHERE)
    preset: str | None = option(
        None,
        "sets method, bits and effort at once (described below); flags that are also given take precedence",
        choices=tuple(PRESETS),
        group=WHAT,
    )
    resume: bool = option(False, "continue an interrupted run after its last finished block", group=WHERE)
    overwrite: bool = option(False, "replace an existing checkpoint", group=WHERE)
    dry_run: bool = option(
        False,
        "only show what each layer would get, sizes, memory, the estimated time (one block is tried), and whether the"
        " result can be exported",
        group=WHERE,
    )
    require_export: bool = option(False, "refuse a model that `rankbook export` cannot write", group=WHERE)

    def __post_init__(self) -> None:
        # Before the methods, and with them torch, are loaded: a mistake should not cost seconds.
        check_replaceable(self.output, MANIFEST)
        if (self.output / MANIFEST).is_file() and not (self.overwrite or self.resume or self.dry_run):
            raise UsageError(
                f"{self.output} holds a checkpoint already; give another folder, or --overwrite to replace it"
            )
        super().__post_init__()

    @classmethod
    def completed(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what was given with what the preset adds."""
        return with_preset(values["preset"], values) if values.get("preset") else values


def run(options: Quantize) -> Outcome:
    """Quantize."""
    import torch

    from rankbook.calibration.driver.run import plan, quantize_model

    if options.threads:
        torch.set_num_threads(options.threads)
    elif workers := options.local_workers():
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    chosen: QuantizeOptions = part(options, QuantizeOptions)
    console = Console(quiet=options.quiet)
    width = f"{chosen.code_bits()} bits" if chosen.target_bits is None else f"{chosen.target_bits} stored bits"
    reasons: list[str] = []

    def begin(config: Any, planned: Plan) -> None:
        console.log(planned.sentence())
        reasons.append(_cannot_export(config, options))

    model = at_revision(options.model, options.revision)
    if options.dry_run:
        config, planned = plan(model, chosen)
        if chosen.target_bits is not None:
            note("target_bits is spent while the run reads text: what is shown is without it")
        if chosen.cluster:
            note("the time is that of this machine alone, without the cluster")
        return _dry(planned, _cannot_export(config, options))
    with console.progress(f"quantizing with {chosen.method} at {width}") as show:

        def progress(step: Progress) -> None:
            where = f"block {step.block + 1}/{step.blocks}, " if step.block >= 0 else ""
            show(step.fraction, f"{where}{step.stage}")

        # What Ray says of workers that are lost goes to stdout otherwise, into the JSON.
        with contextlib.redirect_stdout(sys.stderr) if chosen.cluster else contextlib.nullcontext():
            report = quantize_model(
                model, options.output, chosen, resume=options.resume, progress=progress, begin=begin
            )
    if chosen.calib is None and report.calibration_windows["windows"]:
        console.log("calibrated on text sampled from the model itself; --calib FILE with text of your use fits better")
    summary = {
        "bits_per_weight": report.bits_per_weight,
        "method": chosen.method,
        "cannot_export": reasons[0],
        **report.to_json(),
    }
    return Outcome(summary, _tables(report), str(options.output), config_folder=options.output)


def _cannot_export(config: Any, options: Quantize) -> str:
    """Return why a model cannot be exported, having said so; an empty string where it can be."""
    from rankbook.exporter.exportable import check_exportable

    reason = check_exportable(config)
    if reason and options.require_export:
        raise UsageError(f"cannot be exported: {reason}; leave out --require-export to use it in PyTorch")
    if reason:
        note(f"the checkpoint cannot be exported: {reason}; it runs in PyTorch only")
    return reason


def _dry(planned: Plan, reason: str) -> Outcome:
    rows: list[tuple[str, object]] = [
        ("layers that would be packed", planned.layers),
        ("share of the weights in the blocks", f"{planned.packed_share:.1%}"),
        *[(f"left alone: {why}", f"{len(names)} such as {names[0]}") for why, names in planned.reasons().items()],
        ("cannot be exported", reason or "it can be"),
    ]
    kinds = Counter(spec for spec in planned.specs.values())
    bits = sum(spec.bits_per_weight() * spec.weights for spec in planned.specs.values())
    total = bits / sum(spec.weights for spec in planned.specs.values())
    rows += [("stored bits per weight", total), ("packed layers", megabytes(round(bits / 8)))]
    rows += [(f"memory: {part}", megabytes(size)) for part, size in planned.memory.items()]
    if planned.seconds is not None:
        text = "an estimate from one block; without reading, writing, sampled text and embeddings"
        rows.append(("time of the blocks", f"about {duration(planned.seconds)} ({text})"))
    columns = ("layers", "method", "bits", "N x K", "group", "rank", "error rank", "stored bits/weight")
    each = [
        [
            *(count, s.method, s.bits, f"{s.out_features} x {s.in_features}", s.group, s.planes),
            *(s.branch_rank or None, s.bits_per_weight()),
        ]
        for s, count in kinds.items()
    ]
    layers = {
        name: {**spec.to_json(), "bits_per_weight": spec.bits_per_weight()} for name, spec in planned.specs.items()
    }
    summary = {**asdict(planned), "specs": layers, "bits_per_weight": total, "cannot_export": reason}
    tables = [Table("what would be done", ("property", "value"), rows), Table("what layers get", columns, each)]
    return Outcome(summary, tables)


def method_help(arguments: Sequence[str]) -> str:
    """Return the presets and the options of the method that ``arguments`` name, for the end of ``--help``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method")
    name = parser.parse_known_args(list(arguments))[0].method
    if name is None:
        lines = [textwrap.wrap(f"{preset}: {PRESETS[preset].text}", 100, break_on_hyphens=False) for preset in PRESETS]
        return "\n".join(["presets:", *("  " + "\n    ".join(line) for line in lines)])
    from rankbook.tools.method_list import find, help_text

    return help_text(find(name))


def _tables(report: QuantizeReport) -> list[Table]:
    from rankbook.calibration.checkpoint.card import spread

    linear, specs = report.totals["linear"], [layer.spec for layer in report.layers.values()]
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
        *_experts(report),
        *[(f"layers by {text}", spread(specs, name)) for name, text in _COUNTED.items()],
        ("computed on", ", ".join(report.devices)),
        *_cluster(report),
        ("seconds", report.seconds),
        ("peak memory, GB", report.peak_rss_bytes / 1e9),
    ]
    if report.resumed_at:
        rows.append(("resumed after block", report.resumed_at))
    return [Table("checkpoint", ("property", "value"), rows)]


_COUNTED = {"bits": "bits", "planes": "planes", "branch_rank": "rank of the error branch"}
"""What the table calls properties of a `LayerSpec`."""


def _cluster(report: QuantizeReport) -> list[tuple[str, object]]:
    """Say what solved the layers where it was not this process."""
    if not (about := report.cluster):
        return []
    return [("layers solved on", f"{about['address']}, {about['tasks_at_once']} at once")]


def _experts(report: QuantizeReport) -> list[tuple[str, object]]:
    """Say how many layers of experts saw too few tokens; nothing for a model without experts."""
    from rankbook.calibration.model.experts import matrix_of

    experts = sum(matrix_of(name) is not None for name in report.layers)
    if not experts:
        return []
    return [("layers of experts", experts), ("  of which with shared statistics: few tokens", len(report.few_tokens))]


COMMAND = Command(
    name="quantize",
    summary="quantize a model to a low-bit checkpoint",
    example="rankbook quantize MODEL --method lcq --bits 3 --rank 2 --group-size 64 --calib text.txt -o q",
    options=Quantize,
    run=run,
    more_help=method_help,
)
