"""The kernels read and write only what they are given, have no undefined behaviour and no races between tasks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.plugins.toolchain import build_check, tool

ROOT = Path(__file__).resolve().parents[2]


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
