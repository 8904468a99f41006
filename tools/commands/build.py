"""``rankbook build``: a TensorRT engine from an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankbook.calibration.option import WHERE, argument, required
from rankbook.calibration.source import ENGINE_NAME
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.deploy.engine import COMMANDS
from rankbook.tools.deploy.manifest import EngineReport
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.report import Table, megabytes
from rankbook.tools.runtimes import build_engine


@dataclass(frozen=True, kw_only=True)
class Build(BuildOptions, Common):
    """Options of the verb: those of the build, and where things are."""

    source: Path = argument("checkpoint, exported folder or .onnx file", metavar="MODEL", group=WHERE)
    output: Path = required(
        "folder for the engine and what running it needs", metavar="DIR", flags=("-o", "--output"), group=WHERE
    )


def run(options: Build) -> Outcome:
    """Build and verify."""
    options.check()
    console = Console(quiet=options.quiet)
    with console.progress(f"building {options.target} engine") as progress:
        report = build_engine(options.target, options.source, options.output, options, progress)
    without = [f"the same without rankbook: {options.output / COMMANDS}"] if report.commands else []
    return Outcome(
        report=report,
        tables=_tables(report),
        text="\n".join([str(options.output / ENGINE_NAME), *without]),
        passed=report.passed,
        config_folder=options.output,
    )


def _tables(report: EngineReport) -> tuple[Table, ...]:
    facts = [
        ("TensorRT" if report.target == "trt" else "TensorRT-RTX", report.version),
        ("compute capabilities", " ".join(report.capabilities) or "this GPU"),
        ("engine", megabytes(report.engine_bytes)),
        ("weights in the engine", megabytes(report.weights_bytes)),
        ("tensors in the file", megabytes(report.stored_bytes)),
        ("profiles", ", ".join(report.profiles)),
        ("network layers", report.network_layers),
        ("engine layers", sum(report.layers.values())),
        *((f"kernels a call, {name}", _counts(kinds)) for name, kinds in report.kernels.items()),
        ("a decode step must move", ", ".join(f"{name} {megabytes(size)}" for name, size in report.step_bytes.items())),
        ("plugin layers", report.plugin_layers or "none: the function bodies are built"),
        *([("plugins", report.plugin_form)] if report.plugin_form else []),
        ("build time", f"{report.seconds:.1f} s"),
    ]
    checks = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in report.checks]
    return Table("engine", ("property", "value"), facts), Table("checks", ("check", "verdict", "detail"), checks)


def _counts(kinds: Mapping[str, int]) -> str:
    whole, *parts = (f"{count} {kind}" for kind, count in kinds.items())
    return f"{whole.removesuffix(' all')} ({', '.join(parts)})"


COMMAND = Command(
    name="build",
    summary="build a TensorRT-RTX (or TensorRT) engine and verify it",
    example="rankbook build q --target rtx --compute-capability SM86 SM120 --max-context 2048 -o engine",
    options=Build,
    run=run,
)
