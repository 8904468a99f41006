"""The kernels read and write only what they are given, have no undefined behaviour and no races between tasks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str | None:
    """Return a build tool: the one of this environment (a wheel may bring it) before the system's."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def build_check(folder: Path, *options: str) -> Path:
    """Build tests/native/check_kernels.cpp with the kernels in ``folder``; skips where CMake or Ninja is missing."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if not (cmake and ninja):
        pytest.skip("cmake and ninja are needed: make native installs them")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DCMAKE_BUILD_TYPE=None", "-DRANKBOOK_KERNEL_CHECK=ON", *options]
    for command in (configure, [cmake, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "plugins" / "csrc" / "check_kernels"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    """Every width and instruction set, on buffers of exact size and two threads, under the sanitizers."""
    if not (tool("c++") or tool("g++") or tool("clang++")):
        pytest.skip("a C++ compiler is needed")
    check = build_check(tmp_path, f"-DRANKBOOK_SANITIZE={sanitizers}", "-DCMAKE_CXX_FLAGS=-O0")  # -O1: ten times longer
    environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(check)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
