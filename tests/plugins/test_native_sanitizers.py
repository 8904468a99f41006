"""The kernels read and write only what they are given, have no undefined behaviour and no races between tasks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.plugins import sanitized
from tests.plugins.toolchain import build_check, tool


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


@pytest.mark.slow
def test_what_reads_a_file_is_clean(tmp_path: Path) -> None:
    """ONNX Runtime's library on nodes whose constants lie: nothing beyond them is read.

    The address sanitizer sees reads of heap memory beyond what ONNX Runtime took for a constant.
    """
    if reason := sanitized.unavailable():
        pytest.skip(reason)
    here, fuzz = Path(__file__).parent, Path(__file__).parents[1] / "fuzz"
    tests = [str(here / "test_native_forms.py"), str(here / "test_native_rows.py"), str(fuzz / "test_native.py")]
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-k", "not instruction_set"]
    done = sanitized.run(f"import sys, pytest; sys.exit(pytest.main({[*options, *tests]!r}))", tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
