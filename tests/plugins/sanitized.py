"""ONNX Runtime's library under the sanitizers: ``python -m tests.plugins.sanitized CODE`` runs Python code with it.

``make fuzz-native`` fuzzes it so; the tests of forms, rows and damaged nodes run so, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.plugins.toolchain import ROOT, build, ort_headers, output, tool

_WITH = "import pathlib; from rankbook.plugins import library; library._FOLDER = pathlib.Path({folder!r});"


def unavailable() -> str | None:
    """Return why it cannot be built, or None."""
    if (tool("c++") or tool("g++")) is None or ort_headers() is None:
        return "a C++ compiler and ONNX Runtime's headers are needed: make native gets them"
    if not all(Path(path).is_file() for path in _preloaded()):
        return "the compiler has no address sanitizer"
    return None


def _preloaded() -> list[str]:
    """Return what Python, which is not built with it, loads first; the C++ runtime too, whose exceptions it watches."""
    compiler = tool("c++") or tool("g++")
    assert compiler is not None
    return [output(compiler, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]


def run(code: str, folder: Path, *, echo: bool = False) -> subprocess.CompletedProcess[str]:
    """Build the library in a folder and run Python code that finds it there; `echo` shows its output."""
    options = ["-DRANKBOOK_SANITIZE=address,undefined", "-DCMAKE_CXX_FLAGS=-O0", "-DRANKBOOK_CUDA=OFF"]
    built = build(folder, *options, f"-DONNXRUNTIME_INCLUDE_DIR={ort_headers()}", target="rankbook_ort")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(_preloaded()),
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16",  # Python never frees some of its memory
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "RANKBOOK_NATIVE_ISA": "portable",
        "PYTHONPATH": f"{ROOT / '.pkg'}:{ROOT}",
    }
    command = [sys.executable, "-c", _WITH.format(folder=str(built)) + code]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=not echo, text=True, check=False)


if __name__ == "__main__":
    if reason := unavailable():
        sys.exit(reason)
    sys.exit(run(sys.argv[1], ROOT / "build" / "sanitized", echo=True).returncode)
