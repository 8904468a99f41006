"""Compilers, tools of binutils and CUDA, TensorRT's lean runtime: where they are, and what tests do without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = "RANKBOOK_EXPECT_CUDA" in os.environ
"""Set by .ci/run where the CUDA libraries were built: from there on, what cannot be tested fails."""


def tool(name: str) -> str | None:
    """Return a tool: of this environment (a wheel may bring it), of the system, or of ``make native-cuda``."""
    own, cuda = Path(sys.executable).parent, ROOT / "build" / "cuda-tools" / "nvidia" / "cu13" / "bin"
    return shutil.which(name, path=os.pathsep.join([str(own), os.environ.get("PATH", ""), str(cuda)]))


def build_check(folder: Path, *options: str) -> Path:
    """Build tests/native/check_kernels.cpp with the kernels in ``folder``; skips where CMake or Ninja is missing."""
    return build(folder, "-DRANKBOOK_KERNEL_CHECK=ON", *options) / "check_kernels"


def build(folder: Path, *options: str, target: str = "all") -> Path:
    """Build a target of the native code in ``folder`` and return where it lies."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not (cmake and ninja):
        pytest.skip("cmake and ninja are needed: make native installs them")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DCMAKE_BUILD_TYPE=None", *options]
    for command in (configure, [cmake, "--build", str(folder), "--target", target]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "plugins" / "csrc"


def ort_headers() -> Path | None:
    """Return the folder of ONNX Runtime's headers, or None."""
    folders = [Path(os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/nowhere")), Path("/usr/include/onnxruntime")]
    folders += (ROOT / "build" / "native" / "onnxruntime-headers").glob("**/include/onnxruntime")
    return next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)


def required_tool(name: str) -> str:
    """Return the path of a tool, or skip; in CI its absence is a failure."""
    found = tool(name)
    if found is None:
        assert not EXPECTED, f"{name} must be there: `make native-cuda` gets it"
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


LEAN = ROOT / "build" / "tensorrt-lean"


STUBBED = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


def lean_unavailable() -> str | None:
    """Return why TensorRT's registry cannot be used here, or None."""
    if not (LEAN / "tensorrt_bindings").is_dir():
        return f"{LEAN} is missing: `make native-all` gets it"
    return None if shutil.which("cc") else "no C compiler"


def lean_environment_in(folder: Path) -> dict[str, str]:
    """Compile the stand-ins into a folder; return the variables of a process that may import `tensorrt_bindings`."""
    runtime = LEAN / "tensorrt_lean_libs" / "libnvinfer_lean.so.11"
    source = Path(__file__).with_name("trt_stubs.c")
    for name in STUBBED:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run([*command, "-Wl,--no-as-needed", str(runtime)], check=True)
    modules = os.pathsep.join(filter(None, [str(LEAN), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "LD_LIBRARY_PATH": f"{folder}:{runtime.parent}", "PYTHONPATH": modules}
