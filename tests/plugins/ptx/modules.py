"""Where the PTX under test comes from: the built library, and nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from rankbook.plugins import library
from rankbook.tools.dev import sass
from tests.plugins.emulated import CSRC, ROOT

SOURCE = Path(__file__).with_name("kernels.cu")


def nvcc() -> str | None:
    """Return the CUDA compiler of the system, or of the wheels that `make native-cuda` gets, or None."""
    wheels = ROOT / "build" / "cuda-tools" / "nvidia" / "cu13" / "bin"
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(wheels)]))


def of_library(folder: Path) -> str:
    """Return all PTX that the TensorRT plugin library carries, for its oldest architecture."""
    tool = sass.tool("cuobjdump")
    subprocess.run([tool, "-xptx", "all", str(library.library("trt"))], cwd=folder, check=True, capture_output=True)
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.ptx")))


def compiled(architecture: int, folder: Path) -> str:
    """Compile kernels.cu to PTX, with the flags of the library.

    Raises:
        RuntimeError: The compiler's messages.
    """
    target = folder / f"sm_{architecture}.ptx"
    flags = [
        "-ptx",
        f"-arch=sm_{architecture}",
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "--expt-relaxed-constexpr",
        f"-I{CSRC}",
    ]
    command = [str(nvcc()), *flags, str(SOURCE), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return target.read_text()
