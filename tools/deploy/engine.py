"""Builds a TensorRT engine from an exported file in a child process and verifies what came out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.extras import copy_extras
from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.calibration.checkpoint.output import replaced_folder
from rankbook.calibration.source import ENGINE_MANIFEST, ENGINE_NAME, is_checkpoint
from rankbook.calibration.versions import installed
from rankbook.plugins import library
from rankbook.tools.child import run_module
from rankbook.tools.deploy import engine_commands, engine_log, gpu_code, polygraphy_network, step
from rankbook.tools.deploy.checks import check_cache, check_parser, has_plugin, verify, verify_cache, verify_plugins
from rankbook.tools.deploy.manifest import EngineReport, EngineSource
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.deploy.profiles import Shapes, make_profiles
from rankbook.tools.errors import CheckFailedError, UsageError
from rankbook.tools.report import plain
from rankbook.tools.runtimes import trt

if TYPE_CHECKING:
    import onnx

    from rankbook.exporter.file import ExportedModel

TIMING_CACHE_NAME = "timing.cache"
"""Measured tactics of TensorRT's builder; the next build into the same folder starts from them."""
GRAPH, COMMANDS, LOG = "onnx", "commands.sh", "build.log"
"""In the engine folder: what a checkpoint was exported to, the same build with other tools, the builder's log."""


class ParserRefusedError(CheckFailedError):
    """TensorRT's parser does not take the graph."""


def build(
    source: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    progress: Callable[[float, str | None], None] = lambda *_: None,
) -> EngineReport:
    """Build and verify an engine; ``output`` gets the new engine as a whole or stays as it was.

    >>> report = rankbook.build("onnx", "engine", rankbook.BuildOptions(compute_capability=("SM86",)))
    >>> report.passed, report.capabilities
    (True, ('SM86',))

    Args:
        source: A checkpoint, which is exported with ``--graph static`` into the folder `GRAPH` of ``output``; or an
            exported folder or ``.onnx`` file.
        output: Folder for the engine, what `rankbook.tools.deploy.manifest.EngineReport` says of it, the commands that
            build the same, tokenizer and configuration.
        options: What to build; the defaults without.
        progress: Called with the fraction done and the builder's phase.

    Raises:
        UsageError: The source is not usable.
        CheckFailedError: The builder failed.
        FileExistsError: ``output`` holds something else than an engine.
        ValueError: The checkpoint cannot be exported.
    """
    from rankbook.exporter.file import ExportedModel  # with numpy, for which --help does not wait

    options, output = options or BuildOptions(), Path(output)
    options.check()
    checkpoint = is_checkpoint(source)
    options.check_source(checkpoint=checkpoint)
    with replaced_folder(output, ENGINE_MANIFEST) as folder, _workspace(folder, options.keep_files) as work:
        if checkpoint:
            source = _exported(source, folder / GRAPH, options, progress)
        model = ExportedModel.open(Path(source))
        model.require_packed()
        model.require_standard()
        check_cache(model)
        check_parser(model, installed("tensorrt") if options.target == "trt" else None)
        if (plugins := options.plugin_library()) and any(map(has_plugin, model.packed)):
            gpu_code.check(plugins, options.capabilities)
        profiles = make_profiles(model.inputs, options.limits(int(model.metadata.max_context or 0)))
        request = _request(model.path, folder, work, options)
        request |= {
            "profiles": list(profiles.values()),
            # TensorRT-RTX measures nothing while it builds.
            "timing_cache": [str(f / TIMING_CACHE_NAME) for f in (output, folder)] if options.target == "trt" else None,
        }
        try:
            result, graph = _build_either_way(model, request, work, progress)
        except CheckFailedError as error:
            raise CheckFailedError(f"{error}; {_kept_log(work, output, options.keep_files)}") from error
        log = engine_log.read(work / LOG)
        kept = graph == model.path or options.keep_files
        places = {"source": _named(model.path, folder), "graph": _named(graph, folder) if kept else None}
        report = _report(model, options, profiles, {**result, **places}, log, sha256_file(folder / ENGINE_NAME))
        (folder / ENGINE_MANIFEST).write_text(json.dumps(plain(report), indent=2) + "\n", encoding="utf-8")
        if report.commands:
            (folder / COMMANDS).write_text(engine_commands.script(report.commands), encoding="utf-8")
            if plugins:
                shutil.copyfile(polygraphy_network.__file__, folder / engine_commands.NETWORK)
        if (model.path.parent / "config.json").is_file():  # not any folder in which a graph lies
            copy_extras(model.path.parent, folder, also=("config.json",))
    return report


def _request(graph: Path, folder: Path, work: Path, options: BuildOptions) -> dict[str, Any]:
    """Return what `rankbook.tools.deploy.rtx_worker` is asked for, shapes and timings left out."""
    plugins = options.plugin_library()
    if options.self_contained and plugins is None:
        raise UsageError(f"--self-contained stores the plugin library, but {_why_no_plugins(options)}")
    return {
        "module": "tensorrt_rtx" if options.target == "rtx" else "tensorrt",
        "onnx": str(graph),
        "engine": str(folder / ENGINE_NAME),
        "log": str(work / LOG),
        "capabilities": list(options.capabilities),
        "workspace_bytes": options.workspace_bytes,
        "plugins": [str(plugins)] if plugins else [],
        "aot": options.aot,
        "self_contained": options.self_contained,
    }


def _exported(
    checkpoint: str | Path, folder: Path, options: BuildOptions, progress: Callable[[float, str | None], None]
) -> Path:
    """Export a checkpoint for the engine; return the graph."""
    from rankbook.exporter.export import MODEL, export

    export(checkpoint, folder, options.graph(), progress=lambda stage, *_: progress(0.0, f"export: {stage}"))
    return folder / MODEL


def _named(path: Path, folder: Path) -> Path:
    """Return how a file is named in the folder, which may be moved: by the way from there, or if outside as a whole."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path.absolute()


def _why_no_plugins(options: BuildOptions) -> str:
    return (
        "--no-plugins leaves it out" if options.no_plugins else library.unavailable("trt") or "plugins are switched off"
    )


def _build_either_way(
    model: ExportedModel, request: dict[str, Any], work: Path, progress: Callable[[float, str | None], None]
) -> tuple[dict[str, Any], Path]:
    """Build from the file as it is or, where the parser refuses its functions, from the graph without functions."""
    from rankbook.exporter.engine_graph import with_engine_bodies

    plugins, proto, graph = bool(request["plugins"]), model.proto, model.path
    if any(node.operator and node.operator.one_of and not (plugins and has_plugin(node)) for node in model.packed):
        proto = with_engine_bodies(model)
        graph = _written(proto, model, work / "experts.onnx")
    try:
        return run_worker({**request, "onnx": str(graph)}, progress), graph
    except ParserRefusedError:
        if plugins and all(map(has_plugin, model.packed)):  # no function is expanded: another reason
            raise
        graph = inline_bodies(proto, model, work)
        return run_worker({**request, "onnx": str(graph)}, progress), graph


@contextlib.contextmanager
def _workspace(folder: Path, keep: bool) -> Iterator[Path]:
    if keep:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rankbook-build-") as temporary:
        yield Path(temporary)


def _kept_log(work: Path, output: Path, keep: bool) -> str:
    """Keep the log of a builder that failed beside the folder that it does not fill; say where."""
    if not keep:
        return "--keep-files keeps the builder's log"
    if not (work / LOG).is_file():
        return "the builder wrote no log"
    kept = output.with_name(f"{output.name}.{LOG}")
    shutil.copyfile(work / LOG, kept)
    return f"the builder's log is {kept}"


def inline_bodies(proto: onnx.ModelProto, model: ExportedModel, folder: Path) -> Path:
    """Write a graph of a file with the bodies of rankbook's nodes expanded.

    TensorRT's parser names a DequantizeLinear layer after its node and may refuse a name twice, that is the second use
    of one function; `rankbook.exporter.functions` has a way around it that depends on the parser's version. Expanded
    nodes get names of their own.
    """
    import onnx.inliner

    inlined = onnx.inliner.inline_local_functions(proto)
    for index, node in enumerate(inlined.graph.node):
        if node.op_type == "DequantizeLinear":
            node.name = f"{node.name or 'dequantize'}_{index}"
    return _written(inlined, model, folder / "inlined.onnx")


def _written(proto: onnx.ModelProto, model: ExportedModel, target: Path) -> Path:
    """Write another graph of a file; weights stay where they are, reached through links."""
    target.write_bytes(proto.SerializeToString())
    for name, file in model.data_files.items():
        link = target.parent / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():  # within the folder, which may be moved, by the way from one to the other
            link.symlink_to(os.path.relpath(file, link.parent) if file.is_relative_to(target.parent) else file)
    return target


def run_worker(request: dict[str, Any], progress: Callable[[float, str | None], None]) -> dict[str, Any]:
    """Run `rankbook.tools.deploy.rtx_worker` on a request and return its result.

    Raises:
        CheckFailedError: The builder reported an error or its process died.
    """
    with tempfile.TemporaryDirectory(prefix="rankbook-libraries-") as libraries:
        environment = trt.rtx_environment(Path(libraries))
        done = run_module(
            "rankbook.tools.deploy.rtx_worker", request=request, environment=environment, progress=progress
        )
    said: dict[str, Any] = done.report or {}
    if said.get("errno") is not None:
        raise OSError(said["errno"], said["error"])
    if "parser refused" in said.get("error", ""):
        raise ParserRefusedError(said["error"])
    if "result" not in said:
        reason = said.get("error") or done.message or f"its process ended with code {done.code}"
        raise CheckFailedError(f"building the engine failed: {reason}")
    result: dict[str, Any] = said["result"]
    return result


def _report(
    model: ExportedModel,
    options: BuildOptions,
    profiles: dict[str, Shapes],
    result: dict[str, Any],
    log: engine_log.EngineLog,
    sha256: str,
) -> EngineReport:
    found = step.kernels(log, profiles, int(model.metadata.max_context or 0))
    source = EngineSource(str(result["source"]), sha256_file(model.path), dict(model.metadata.properties))
    return EngineReport(
        target=options.target,
        version=result["version"],
        source=source,
        capabilities=options.capabilities,
        engine_bytes=result["engine_bytes"],
        engine_sha256=sha256,
        weights_bytes=log.weights_bytes,
        stored_bytes=model.stored_bytes,
        constant_bytes=log.constant_bytes(),
        activation_bytes=log.activation_bytes,
        network_layers=result["network_layers"],
        plugin_layers=result["plugin_layers"],
        layers=dict(log.layers),
        kernels=found,
        step_bytes=step.step_bytes(model, profiles["decode"]),
        inputs=result["inputs"],
        outputs=result["outputs"],
        profiles=profiles,
        checks=(
            *verify(model, profiles, result, log),
            verify_plugins(model, options, result),
            # The names in the log of TensorRT proper have not been seen.
            *(verify_cache(model, found, log) if options.target == "rtx" else ()),
        ),
        self_contained=options.self_contained,
        plugin_form=options.form() if result["plugin_layers"] else "",
        commands=_commands(result["graph"], options, profiles),
        seconds=result["seconds"],
    )


def _commands(graph: Path | None, options: BuildOptions, profiles: dict[str, Shapes]) -> dict[str, str]:
    if options.aot or graph is None:  # neither tool can register plugins of this form; expanded bodies were not kept
        return {}
    plugins = options.plugin_library()
    build = engine_commands.Build(
        graph, ENGINE_NAME, options.target, options.capabilities, profiles, plugins, options.self_contained
    )
    return {"trtexec": engine_commands.trtexec(build), "polygraphy": engine_commands.polygraphy(build)}
