"""``rankbook build``: a TensorRT engine from an exported file."""

from __future__ import annotations

import argparse
from pathlib import Path

from rankbook.calibration.source import ENGINE_NAME
from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console
from rankbook.tools.deploy.engine import BuildOptions, EngineReport, build
from rankbook.tools.deploy.profiles import Limits
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.report import Table, megabytes
from rankbook.tools.runtimes import trt


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add("source", type=Path, metavar="MODEL", required=True, text="exported folder or .onnx file")
    flags.add("-o", "--output", type=Path, metavar="DIR", required=True, text="folder for model.engine and engine.json")
    flags.add("--target", choices=("rtx", "trt"), default="rtx", text="TensorRT-RTX (no GPU needed) or TensorRT")
    flags.add(
        "--compute-capability",
        nargs="+",
        metavar="SM",
        default=("SM80", "SM86", "SM89", "SM120"),
        text=f"GPUs to build for, of {', '.join(trt.RTX_CAPABILITIES)}; rtx only",
    )
    flags.add("--max-batch", type=int, default=1, metavar="N", text="largest batch")
    flags.add("--max-sequence", type=int, default=512, metavar="N", text="longest prompt of one call, in tokens")
    flags.add("--max-context", type=int, default=1024, metavar="N", text="longest context with the cache, in tokens")
    flags.add("--workspace", type=int, metavar="MIB", text="bound of the builder's workspace, in MiB")
    flags.add(
        "--plugins",
        choices=("library", "aot"),
        default="library",
        text="our kernels from the plugin library, or as PTX inside the engine (trt only; never tried on a GPU)",
    )
    flags.add(
        "--no-plugins",
        action="store_true",
        default=False,
        text="build the function bodies even where the plugin library is built (`make native-cuda`)",
    )
    flags.add(
        "--self-contained",
        action="store_true",
        default=False,
        text="store the plugin library in the engine (loading it needs runtime.engine_host_code_allowed = True)",
    )
    flags.add("--keep-files", action="store_true", default=False, text="keep the builder's log (and an inlined graph)")


def run(options: argparse.Namespace) -> Outcome:
    """Build and verify."""
    settings = BuildOptions(
        target=options.target,
        capabilities=_capabilities(options.compute_capability) if options.target == "rtx" else (),
        limits=Limits(options.max_batch, options.max_sequence, options.max_context),
        workspace_bytes=options.workspace * 2**20 if options.workspace else None,
        keep_files=options.keep_files,
        plugins=not options.no_plugins,
        self_contained=options.self_contained,
        aot=options.plugins == "aot",
    )
    settings.check()
    reason = trt.rtx_unavailable() if options.target == "rtx" else trt.unavailable()
    if reason:
        raise MissingError(f"--target {options.target} cannot be built here: {reason}")
    console = Console(quiet=options.quiet)
    with console.progress(f"building {options.target} engine") as progress:
        report = build(options.source, options.output, settings, progress)
    without = ["the same without rankbook:"] if report.commands else []
    return Outcome(
        report=report,
        tables=_tables(report),
        text="\n".join([str(options.output / ENGINE_NAME), *without, *report.commands.values()]),
        passed=report.passed,
        config_folder=options.output,
    )


def _capabilities(names: list[str]) -> tuple[str, ...]:
    """Accept ``86``, ``8.6``, ``sm86`` and comma-separated lists."""
    wanted = [part for name in names for part in name.replace(",", " ").split()]
    found = tuple(
        dict.fromkeys("SM" + name.upper().removeprefix("SM").removeprefix("_").replace(".", "") for name in wanted)
    )
    unknown = [name for name in found if name not in trt.RTX_CAPABILITIES]
    if unknown or not found:
        allowed = ", ".join(trt.RTX_CAPABILITIES)
        raise UsageError(
            f"--compute-capability {', '.join(unknown) or '(none)'} is not available; choose from {allowed}"
        )
    return found


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
        ("plugin layers", report.plugin_layers or "none: the function bodies are built"),
        ("plugins", report.plugin_form),
        ("build time", f"{report.seconds:.1f} s"),
    ]
    checks = [(check.name, "ok" if check.passed else "FAILED", check.detail) for check in report.checks]
    return Table("engine", ("property", "value"), facts), Table("checks", ("check", "verdict", "detail"), checks)


COMMAND = Command(
    name="build",
    summary="build a TensorRT-RTX (or TensorRT) engine and verify it",
    example="rankbook build onnx --target rtx --compute-capability SM86 SM120 --max-context 2048 -o engine",
    add_flags=add_flags,
    run=run,
)
