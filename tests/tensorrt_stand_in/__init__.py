"""Stands for ``tensorrt`` and ``tensorrt_rtx`` where there is no GPU: engines run in ONNX Runtime on host memory.

Classes have the names, methods and arguments of the bindings, and nothing else that is public
(`tests.tools.runtimes.test_stand_in` compares them). They are strict about what a GPU would not forgive: work happens
when the stream is waited for and not before, memory must live until then, sizes must lie within the profile, shapes and
addresses must be set after the profile, an aliased output must have the address of its input, and what is recorded into
a CUDA graph keeps shapes and addresses. What is wrong in the caller is an AssertionError, which no command catches.

An engine is any file: the ONNX file comes from the manifest of the folder that holds it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rankbook.calibration.source import ENGINE_MANIFEST
from rankbook.tools.deploy import engine as deploy
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.runtimes import trt_memory
from tests.tensorrt_stand_in import bindings
from tests.tensorrt_stand_in.bindings import State as State
from tests.tensorrt_stand_in.memory import HostMemory as HostMemory
from tests.tools.files import pretend

VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1.116"}


def install(monkeypatch: pytest.MonkeyPatch, name: str = "tensorrt_rtx", memory: HostMemory | None = None) -> State:
    """Put a stand-in into the place of a library, and host memory into that of the GPU's."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__["__version__"] = VERSIONS[name]
    state = State(module, memory or HostMemory())
    names = [
        "ILogger",
        "IStreamReaderV2",
        "ICudaEngine",
        "IExecutionContext",
        "TensorIOMode",
        "SeekPosition",
        "DataType",
    ]
    names += ["CudaGraphStrategy", "IRuntimeConfig", "IRuntimeCache"] if name == "tensorrt_rtx" else []
    registry = type("IPluginRegistry", (bindings.IPluginRegistry,), {"_library": state})
    module.__dict__.update({item: getattr(bindings, item) for item in names})
    module.__dict__["Runtime"] = type("Runtime", (bindings.Runtime,), {"_library": state})
    module.__dict__["get_plugin_registry"] = registry
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(trt_memory, "memory", lambda: state.memory)
    pretend(monkeypatch, RUNTIMES[name])
    return state


RUNTIMES = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}
"""Which runtime each library is."""


def work(request: dict[str, Any], _progress: object) -> dict[str, Any]:
    """Stand for the builder's process: write some bytes as the engine."""
    Path(request["log"]).write_text("", encoding="utf-8")
    content = b"engine " + hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest() * 4096
    Path(request["engine"]).write_bytes(content)
    facts: dict[str, Any] = {"version": VERSIONS[request["module"]], "engine_bytes": len(content), "seconds": 0.0}
    return {**facts, "network_layers": 0, "plugin_layers": 0, "inputs": [], "outputs": [], "profiles": 2}


def build(state: State, source: Path, output: Path, options: BuildOptions) -> Path:
    """Write an engine folder as `rankbook build` does, but for the builder; the plugin library takes no part."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deploy, "run_worker", work)
        deploy.build(source, output, replace(options, no_plugins=True))
    state.folders.append(output)
    return output


def change(folder: Path, **facts: Any) -> None:
    """Change what a manifest says."""
    path = folder / ENGINE_MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
