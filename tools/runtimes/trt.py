"""TensorRT and TensorRT-RTX: whether they can be used here, and what their libraries need to be found."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind, Source
from rankbook.tools.child import package_environment
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting

if TYPE_CHECKING:
    from rankbook.tools.deploy.manifest import EngineReport
    from rankbook.tools.deploy.options import BuildOptions

RTX_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""Compute capabilities that TensorRT-RTX 1.x builds for."""


def unavailable() -> str | None:
    """Return why TensorRT (with a GPU) cannot be used on this machine, or None."""
    if find_spec("tensorrt") is None:
        return "tensorrt is not installed: pip install 'rankbook[gpu]' on a machine with an NVIDIA GPU"
    return (
        None if has_gpu() else "tensorrt is installed but no NVIDIA GPU with a driver is visible: run on such a machine"
    )


def rtx_run_unavailable() -> str | None:
    """Return why TensorRT-RTX engines, which are built without a GPU, cannot be run here, or None."""
    return rtx_unavailable() or gpu_unavailable()


def gpu_unavailable() -> str | None:
    """Return why PyTorch, in whose memory engines work, has no GPU here, or None."""
    if not has_gpu():
        return "no NVIDIA driver with a GPU answers: engines run on a machine with one"
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch is not installed: pip install rankbook"
    # Read, not imported: that takes seconds, and `doctor` only asks.
    built = re.search(r"^cuda[^=]*= '([\d.]+)'", Path(spec.origin).with_name("version.py").read_text("utf-8"), re.M)
    if built is None:
        return "this torch is built for the CPU, and engines work in its GPU memory: pip install a torch with CUDA"
    served = driver_version()
    if served is not None and int(served.split(".")[0]) < int(built[1].split(".")[0]):
        return f"the NVIDIA driver serves CUDA {served}, and torch needs {built[1]}: update the driver"
    return None


def driver_version() -> str | None:
    """Return the newest version of CUDA that the driver serves, or None without a driver."""
    import ctypes

    driver, version = _driver(), ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def rtx_unavailable() -> str | None:
    """Return why TensorRT-RTX cannot build engines on this machine (it needs no GPU for that), or None."""
    if find_spec("tensorrt_rtx") is None:
        return "tensorrt-rtx is not installed: pip install 'rankbook[cpu]' (no GPU is needed to build an engine)"
    if sys.platform == "linux" and _rtx_library() is None:
        return "tensorrt-rtx lacks its library libtensorrt_rtx.so.1: pip install --force-reinstall tensorrt-rtx"
    return None


def has_gpu() -> bool:
    """Return whether an NVIDIA driver with at least one device answers (asked through libcuda, no torch needed)."""
    import ctypes

    driver, count = _driver(), ctypes.c_int(0)
    if driver is None:
        return False
    return bool(driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)


def _driver() -> Any:
    import ctypes

    try:
        return ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return None


def rtx_environment(folder: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process that builds TensorRT-RTX engines.

    For a plugin layer the ONNX parser opens ``libtensorrt_rtx.so``, while the wheel ships only ``.so.1``; without the
    link made here the process would abort. The loader reads the variable at start, so this is for child processes.

    Args:
        folder: Where the link is made.
        base: The environment to extend, ``os.environ`` when None.
    """
    environment = package_environment(base)
    library = _rtx_library()
    if library is not None:
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "libtensorrt_rtx.so"
        link.unlink(missing_ok=True)
        link.symlink_to(library)
        paths = [str(folder), str(library.parent), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _rtx_library() -> Path | None:
    spec = find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = Path(next(iter(spec.submodule_search_locations))) / "libtensorrt_rtx.so.1"
    return found if found.is_file() else None


def _open(runtime: str, module: str) -> Callable[[Source, Setting], LanguageModel]:
    def open_engine(source: Source, setting: Setting) -> LanguageModel:
        import importlib

        from rankbook.tools.runtimes import trt_memory
        from rankbook.tools.runtimes.trt_model import EngineModel

        del setting  # an engine's capacity is that of its profiles
        return EngineModel(Path(source.location), importlib.import_module(module), trt_memory.memory(), runtime)

    return open_engine


def _built_for(target: str) -> Callable[[Source], bool]:
    def fits(source: Source) -> bool:
        from rankbook.tools.deploy.manifest import read_facts

        return bool(read_facts(Path(source.location)).get("target") == target)

    return fits


def _build(
    source: Path, output: Path, options: BuildOptions, progress: Callable[[float, str | None], None]
) -> EngineReport:
    from rankbook.tools.deploy.engine import build

    return build(source, output, options, progress)


_ENGINES = frozenset({Kind.ENGINE})
RUNTIMES = (
    Runtime(
        "rtx",
        "tensorrt-rtx",
        "build --target rtx",
        rtx_unavailable,
        lambda: version("tensorrt-rtx"),
        _ENGINES,
        build=_build,
    ),
    Runtime(
        "trt-rtx",
        "tensorrt-rtx, engines",
        "generate, eval, parity, bench, serve of engines of --target rtx",
        rtx_run_unavailable,
        lambda: version("tensorrt-rtx"),
        _ENGINES,
        open=_open("trt-rtx", "tensorrt_rtx"),
        automatic=True,
        fits=_built_for("rtx"),
        cuda=True,
    ),
    Runtime(
        "trt",
        "tensorrt",
        "build --target trt; generate, eval, parity, bench, serve of such engines",
        unavailable,
        lambda: version("tensorrt"),
        _ENGINES,
        open=_open("trt", "tensorrt"),
        build=_build,
        automatic=True,
        fits=_built_for("trt"),
        cuda=True,
    ),
)
