"""The process that builds an engine, see `rankbook.tools.child`.

It runs on its own because the library path must be set before it starts, only the first logger of a process counts,
and a crash of the builder must not take the command down. It reports ``{"result": {...}}`` or
``{"error": "...", "errno": 28}``; the builder's verbose log goes to a file.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rankbook.tools import child


def main() -> int:
    """Build what the request describes; return the exit code."""
    request = child.request()
    try:
        child.say({"result": _build(request)})
    except (RuntimeError, ValueError, OSError) as error:
        child.say({"error": str(error), "errno": getattr(error, "errno", None)})
        return 1
    return 0


def _build(request: dict[str, Any]) -> dict[str, Any]:
    import importlib

    trt = importlib.import_module(request["module"])
    logger = _logger(trt, Path(request["log"]))
    start = time.monotonic()
    builder = trt.Builder(logger)
    if builder is None:
        raise RuntimeError("the builder could not be created; see the log")
    for path in request.get("plugins", ()):
        if trt.get_plugin_registry().load_library(path) is None:
            raise RuntimeError(f"the plugin library {path} could not be loaded; see the log")
    if request.get("aot"):
        from rankbook.plugins import aot

        aot.register(trt, importlib.import_module(f"{trt.__name__}.plugin"))
    network = _parse(trt, builder, logger, request["onnx"])
    parsed_s = time.monotonic() - start
    settings = _settings(trt, builder, network, request)
    serialized = builder.build_serialized_network(network, settings)
    if serialized is None:
        raise RuntimeError(f"the builder refused the network: {logger.last_error or 'no reason given'}")
    if request.get("timing_cache"):
        with Path(request["timing_cache"][1]).open("wb") as stream:
            stream.write(memoryview(settings.get_timing_cache().serialize()))
    with Path(request["engine"]).open("wb") as stream:
        stream.write(memoryview(serialized))
    return {
        "version": trt.__version__,
        "network_layers": network.num_layers,
        "plugin_layers": _count_plugins(trt, network),
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "profiles": settings.num_optimization_profiles,
        "engine_bytes": int(serialized.nbytes),
        "parse_seconds": parsed_s,
        "seconds": time.monotonic() - start,
    }


def _parse(trt: Any, builder: Any, logger: Any, path: str) -> Any:
    # From the file, never from memory: a model of 2 GiB or more parsed from memory can give an empty network silently.
    # The types of the file are kept. Newer versions know nothing else and dropped the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise RuntimeError("the parser refused the model: " + "; ".join(errors[:3]))
    if network.num_layers == 0 or network.num_outputs == 0:
        raise RuntimeError("the parser returned an empty network; the file or its data is incomplete")
    return network


def _settings(trt: Any, builder: Any, network: Any, request: dict[str, Any]) -> Any:
    settings = builder.create_builder_config()
    # The layers with their constants appear in the log only with detailed verbosity; the parent checks them.
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    settings.progress_monitor = _monitor(trt)
    if request.get("workspace_bytes"):
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(request["workspace_bytes"]))
    capabilities = request["capabilities"]
    if capabilities:
        settings.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            settings.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if request.get("self_contained"):
        settings.plugins_to_serialize = request["plugins"]
    if request.get("timing_cache"):
        _start_from_timings(settings, Path(request["timing_cache"][0]))
    for number, shapes in enumerate(request["profiles"]):
        profile = builder.create_optimization_profile()
        for name, (low, typical, high) in shapes.items():
            profile.set_shape(name, tuple(low), tuple(typical), tuple(high))
        if settings.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"optimization profile {number} is not valid for this network: {shapes}")
    del network
    return settings


def _start_from_timings(settings: Any, path: Path) -> None:
    cache = settings.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    # Timings of another GPU or version are refused: then the builder measures anew.
    if cache is None or not settings.set_timing_cache(cache, ignore_mismatch=False):
        settings.set_timing_cache(settings.create_timing_cache(b""), ignore_mismatch=False)


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).rpartition(".")[2], "shape": list(tensor.shape)}


def _count_plugins(trt: Any, network: Any) -> int:
    kinds = {getattr(trt.LayerType, name, None) for name in ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")} - {None}
    return sum(network.get_layer(index).type in kinds for index in range(network.num_layers))


def _logger(trt: Any, path: Path) -> Any:
    class FileLogger(trt.ILogger):  # type: ignore[misc]
        """Writes every message to the log file and remembers the last error."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = ""
            self._stream = path.open("w", encoding="utf-8", errors="replace")

        def log(self, severity: Any, message: str) -> None:
            """Called by the library."""
            self._stream.write(f"{severity.name} {message}\n")
            self._stream.flush()
            # A machine without a driver makes the library report CUDA's absence as an error and go on.
            if severity <= trt.ILogger.ERROR and "CUDA driver version is insufficient" not in message:
                self.last_error = message

    return FileLogger()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns nested phases with numbers of steps into one fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[Any]] = {}
            self._best = 0.0
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Called by the library when a phase begins."""
            self._phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Called by the library after each step; returning False would cancel the build."""
            if phase_name in self._phases:
                self._phases[phase_name][2] = step + 1
            self._report(phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            """Called by the library when a phase ends."""
            self._phases.pop(phase_name, None)

        def _report(self, name: str) -> None:
            fraction, step, current = 0.0, 0.0, name
            while current in self._phases:
                parent, total, done = self._phases[current]
                fraction = (done + fraction) / total
                current = parent
            # Phases repeat (once per profile); a bar that runs backwards would only confuse.
            self._best = max(self._best, min(fraction, 1.0))
            step = time.monotonic()
            if step - self._last > 0.2:
                self._last = step
                child.say({"progress": self._best, "phase": name})

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
