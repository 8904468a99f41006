"""TensorRT and TensorRT-RTX: whether they can be used, and the environment in which the builder must start."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.calibration.source import Kind
from rankbook.tools.child import package_environment
from rankbook.tools.runtimes.base import Runtime

if TYPE_CHECKING:
    from rankbook.tools.deploy.engine import EngineReport
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

    try:
        driver = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def rtx_environment(folder: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process that builds TensorRT-RTX engines.

    Adding a plugin layer makes the library open ``libtensorrt_rtx.so``, while the wheel ships only ``.so.1``; without
    the link made here the process would abort. The loader reads the variable at start, so this is for child processes.

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


def _build(
    source: Path, output: Path, options: BuildOptions, progress: Callable[[float, str | None], None]
) -> EngineReport:
    from rankbook.tools.deploy.engine import build

    return build(source, output, options, progress)


RUNTIMES = (
    Runtime(
        "rtx",
        "tensorrt-rtx",
        "build --target rtx",
        rtx_unavailable,
        lambda: version("tensorrt-rtx"),
        frozenset({Kind.ENGINE}),
        build=_build,
    ),
    Runtime(
        "trt",
        "tensorrt",
        "build --target trt",
        unavailable,
        lambda: version("tensorrt"),
        frozenset({Kind.ENGINE}),
        build=_build,
        cuda=True,
    ),
)
