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


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    """Every width and instruction set, on buffers of exact size and two threads, under the sanitizers."""
    cmake, ninja, compiler = tool("cmake"), tool("ninja"), tool("c++") or tool("g++") or tool("clang++")
    if not (cmake and ninja and compiler):
        pytest.skip("cmake, ninja and a C++ compiler are needed")
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_BUILD_TYPE=None"]
    options = [
        f"-DRANKBOOK_SANITIZE={sanitizers}",
        "-DRANKBOOK_KERNEL_CHECK=ON",
        "-DCMAKE_CXX_FLAGS=-O0",
    ]  # -O1 compiles ten times as long
    for command in ([*configure, f"-DCMAKE_MAKE_PROGRAM={ninja}", *options], [cmake, "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    environment = {**os.environ, "UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [str(tmp_path / "plugins" / "csrc" / "check_kernels")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
