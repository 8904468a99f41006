"""The CUDA kernels with C interfaces, made by nvcc for one GPU: for the tests and the report that run on one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankbook.tools.errors import MissingError

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "plugins" / "csrc"
NATIVE = ROOT / "build" / "native"
"""Where CMake builds."""
FOLDER = ROOT / "build" / "gpu-kernels"
"""Objects and libraries of this module, named by the contents of their sources: they may be copied from elsewhere."""
UNITS = (
    *(f"kernels/cuda/{kind}_{bits}.cu" for kind in ("width", "int8", "experts") for bits in (2, 3, 4, 8)),
    "kernels/cuda/launch.cu",
)
"""Sources of the kernels, relative to `CSRC`."""
INTERFACES = ("emulation/gpu_library.cu", "shims/c/kernels.cpp")
"""What exports them in C: ``rb_*`` for tests (`tests/plugins/emulated.py`), ``rankbook_cuda_*`` for PyTorch."""


def build(architecture: int, native: Path | None = NATIVE) -> Path:
    """Return a library of the kernels for one architecture.

    Objects that `make native-cuda` compiled, the machine code that ships, are linked where they are as new as their
    sources and run on this architecture. Else those of `FOLDER` are, and what is missing there is compiled, a process
    for each source: one call of nvcc over all of them took a quarter of an hour.

    Args:
        architecture: Of the GPU: ten times its compute capability, e.g. 90.
        native: Folder of CMake's build; None: without it, as on a machine that has none.

    Raises:
        MissingError: Something must be compiled and there is no nvcc.
        RuntimeError: The compiler's messages.
    """
    headers = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh") and "cpu" not in path.parts)
    folder = FOLDER / f"sm_{architecture}-{digest(*headers)}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = compiled_kernels(architecture, native) if native else []
    if not objects:
        sources = [CSRC / unit for unit in UNITS]
        objects = [folder / f"{source.stem}-{digest(source)}.o" for source in sources]
        missing = [(source, out) for source, out in zip(sources, objects, strict=True) if not out.exists()]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda step: compile_into([*_nvcc(architecture), "-c", str(step[0])], step[1]), missing))
    interfaces = [CSRC / name for name in INTERFACES]
    library = folder / f"libkernels-{digest(*interfaces, *objects)}.so"
    if not library.exists():
        compile_into([*_nvcc(architecture), "-shared", *map(str, (*interfaces, *objects))], library)
    return library


def compiled_kernels(architecture: int, native: Path = NATIVE) -> list[Path]:
    """Return the object files of all kernels in a build of CMake's.

    Returns:
        None of them if one is missing or older than a source, or if they hold no code that this architecture runs.
    """
    found = [native / f"plugins/csrc/CMakeFiles/rankbook_cuda_kernels.dir/{unit}.o" for unit in UNITS]
    newest = max(path.stat().st_mtime for path in (CSRC / "kernels").rglob("*") if "cpu" not in path.parts)
    fresh = all(path.exists() and path.stat().st_mtime >= newest for path in found)
    cache = native / "CMakeCache.txt"
    settings = cache.read_text() if fresh and cache.is_file() else ""
    built_for = re.search(r"^RANKBOOK_CUDA_ARCHITECTURES:\w+=(.*)$", settings, re.MULTILINE)
    return found if built_for and serves(built_for[1], architecture) else []


def serves(architectures: str, wanted: int) -> bool:
    """Return whether objects hold code that a GPU runs: machine code of its major version, or PTX that is not newer.

    Args:
        architectures: What they were compiled for, as in CMAKE_CUDA_ARCHITECTURES.
        wanted: The architecture of the GPU.
    """
    for entry in architectures.split(";"):
        match = re.fullmatch(r"(\d+)(-real|-virtual)?", entry)
        if match is None and entry in ("native", "all", "all-major"):
            return True
        if match is None or int(match[1]) > wanted:
            continue
        if match[2] != "-real" or int(match[1]) // 10 == wanted // 10:
            return True
    return False


def present_architecture() -> int:
    """Return the architecture of the first GPU of this machine.

    Raises:
        MissingError: The driver names none.
    """
    if (tool := shutil.which("nvidia-smi")) is None:
        raise MissingError("no NVIDIA GPU: nvidia-smi, which comes with the driver, is not installed")
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.match(r"(\d+)\.(\d)", said.stdout)
    if match is None:
        raise MissingError(f"no NVIDIA GPU: nvidia-smi says {(said.stdout + said.stderr).strip()!r}")
    return 10 * int(match[1]) + int(match[2])


def find_nvcc() -> str:
    """Return the compiler: that of PATH, of the usual folder, or of the wheels that the Makefile fetches.

    Raises:
        MissingError: There is none.
    """
    places = (os.environ.get("PATH", ""), "/usr/local/cuda/bin", str(ROOT / "build/cuda-tools/nvidia/cu13/bin"))
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise MissingError(
            "nvcc is not installed: install the CUDA toolkit, or run `make native-cuda`, which fetches it"
        )
    return found


def _nvcc(architecture: int) -> list[str]:
    command = [find_nvcc(), "-std=c++17", "-O2", "-Xcompiler=-fPIC", f"-arch=sm_{architecture}", f"-I{CSRC}"]
    return [*command, "--expt-relaxed-constexpr", *([f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else [])]


def compile_into(command: Sequence[str], target: Path) -> None:
    """Run a compiler that writes ``target``.

    Whoever ends this process leaves no half of it, and two may compile the same at once: the last rename wins.

    Raises:
        RuntimeError: The compiler's messages.
    """
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    done = subprocess.run([*command, "-o", str(partial)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    partial.replace(target)


def digest(*files: Path) -> str:
    """Return a short hash of the contents of files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
