"""The kernels read and write only what they are given, have no undefined behaviour and no races between tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.toolchain import build, build_check, ort_headers, output, tool

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


@pytest.mark.slow
def test_what_reads_a_file_is_clean(tmp_path: Path) -> None:
    """ONNX Runtime's library on nodes whose constants lie: nothing beyond them is read.

    The address sanitizer sees reads of heap memory beyond what ONNX Runtime took for a constant.
    """
    compiler, headers = tool("c++") or tool("g++"), ort_headers()
    if compiler is None or headers is None:
        pytest.skip("a C++ compiler and ONNX Runtime's headers are needed: make native gets them")
    # Python itself is not built with it; beside the C++ runtime, or the sanitizer does not find what throws exceptions.
    names = ("libasan.so", "libstdc++.so")
    preloaded = [output(compiler, f"-print-file-name={name}").strip() for name in names]
    if not all(Path(path).is_file() for path in preloaded):
        pytest.skip("the compiler has no address sanitizer")
    options = ["-DRANKBOOK_SANITIZE=address,undefined", "-DCMAKE_CXX_FLAGS=-O0", "-DRANKBOOK_CUDA=OFF"]
    folder = build(tmp_path, *options, f"-DONNXRUNTIME_INCLUDE_DIR={headers}", target="rankbook_ort")
    tests = [str(Path(__file__).with_name(name)) for name in ("test_native_forms.py", "test_native_rows.py")]
    code = (
        "import sys, pytest, pathlib; from rankbook.plugins import library;"
        f"library._FOLDER = pathlib.Path({str(folder)!r});"
        f"sys.exit(pytest.main(['-q', '-x', '-s', '-p', 'no:cacheprovider', '-k', 'not instruction_set', *{tests!r}]))"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python never frees some of its memory
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "RANKBOOK_NATIVE_ISA": "portable",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
