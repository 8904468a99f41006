"""``rankbook doctor``: what is installed and what each missing piece would enable."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rankbook.calibration.versions import installed
from rankbook.plugins import library
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.commands import ORDER
from rankbook.tools.report import Table
from rankbook.tools.runtimes import runtimes, trt


@dataclass(frozen=True)
class Finding:
    """One thing that may be installed.

    Attributes:
        name: What was looked for.
        kind: ``package``, ``runtime``, ``library``, ``device``, ``header`` or ``tool``.
        found: Whether it was found.
        detail: Version or place; where missing, how to get it.
        enables: What it is for; it names the verbs, or none where it is for all of them. The name of a verb alone: that
            one does nothing without it.
        needed: Whether what it is for cannot work without it.
    """

    name: str
    kind: str
    found: bool
    detail: str
    enables: str
    needed: bool = False

    @property
    def verbs(self) -> tuple[str, ...]:
        """The verbs that it is for."""
        return tuple(verb for verb in ORDER if re.search(rf"\b{verb}\b", self.enables)) or ORDER


_PACKAGES = (
    ("torch", "quantize, export; eval, generate and parity's reference in PyTorch; memory of engines", True),
    ("transformers", "reading models and tokenizers", True),
    ("safetensors", "checkpoints", True),
    ("onnx", "export, inspect, build and everything with exported files", True),
    ("onnx_ir", "export", True),
    ("polygraphy", "parity", True),
    ("rich", "tables and progress", True),
    ("yaml", "--config files in YAML", True),
    ("gguf", "quantize, eval and generate of GGUF files; demo", False),
    ("datasets", "quantize --calib with a data set of the Hugging Face hub", False),
    ("scipy", "quantize --target-bits", False),
    ("ray", "quantize --cluster", False),
    ("matplotlib", "the pictures of bench and report", False),
    ("pynvml", "clocks and power of the GPU in bench --device cuda", False),
    ("fastapi", "serve", False),
    ("uvicorn", "serve", False),
    ("prometheus_client", "serve", False),
)
_DISTRIBUTIONS = {"yaml": "PyYAML", "pynvml": "nvidia-ml-py"}
_LIBRARIES = {
    "ort": "--kernels native and native-int8 of generate, eval, parity, bench and serve",
    "ort-cuda": "--kernels native-cuda of generate, eval, parity and bench",
    "trt": "engines with this project's kernels: build, and generate, eval, parity, bench, serve of them",
}
"""What the native libraries are for."""
_ENGINES = "generate, eval, parity, bench, serve"
"""The verbs that run engines."""


def run(_: Common) -> Outcome:
    """Look around; the verdict is no only if something that rankbook cannot work without is missing."""
    findings = [*_packages(), *_runtimes(), *_libraries(), *_devices(), *_native()]
    missing = [finding.name for finding in findings if finding.needed and not finding.found]
    rows = [(item.name, item.kind, "yes" if item.found else "no", item.detail, item.enables) for item in findings]
    system = f"Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"
    text = f"{system}\n" + (
        f"needed and missing: {', '.join(missing)}" if missing else "everything needed is installed"
    )
    verbs = by_verb(findings)
    report = {"system": system, "findings": [asdict(item) for item in findings], "missing": missing, "verbs": verbs}
    columns = ("what", "kind", "found", "version, place or how to get it", "enables")
    shown = [(verb, "yes" if found["works"] else "no", "; ".join(found["missing"])) for verb, found in verbs.items()]
    tables = [
        Table("", columns, rows),
        Table("verbs", ("verb", "works", "missing, for what the table above says"), shown),
    ]
    return Outcome(report=report, tables=tables, text=text, passed=not missing)


def by_verb(findings: Sequence[Finding]) -> dict[str, dict[str, Any]]:
    """Return for each verb whether it works, and what it lacks; headers and tools are for building libraries alone."""
    used = [item for item in findings if item.kind not in ("header", "tool") and not item.found]
    return {
        verb: {
            "works": not any(item.needed or item.enables == verb for item in used if verb in item.verbs),
            "missing": [item.name for item in used if verb in item.verbs],
        }
        for verb in ORDER
    }


def _packages() -> list[Finding]:
    findings = []
    for name, enables, needed in _PACKAGES:
        package = _DISTRIBUTIONS.get(name, name)
        detail = installed(package) or f"pip install {package}"
        findings.append(Finding(name, "package", find_spec(name) is not None, detail, enables, needed))
    return findings


def _runtimes() -> list[Finding]:
    return [
        Finding(item.title, "runtime", not (reason := item.unavailable()), reason or item.version(), item.enables)
        for item in runtimes().values()
    ]


def _libraries() -> list[Finding]:
    return [
        Finding(
            name, "library", not (reason := library.unavailable(name)), reason or str(library.library(name)), enables
        )
        for name, enables in _LIBRARIES.items()
    ]


def _devices() -> list[Finding]:
    gpu = trt.has_gpu()
    detail = _gpu_names() if gpu else "no NVIDIA driver answers; everything but running engines works without one"
    memory = trt.gpu_unavailable()
    return [
        Finding("NVIDIA GPU", "device", gpu, detail, f"build --target trt; {_ENGINES} of engines"),
        Finding(
            "GPU memory of PyTorch",
            "device",
            memory is None,
            memory or f"the driver serves CUDA {trt.driver_version()}",
            f"quantize, eval, generate, parity with --device cuda; memory of engines in {_ENGINES}",
        ),
    ]


def _gpu_names() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "present"
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip().replace("\n", "; ") or "present"


def _native() -> list[Finding]:
    return [
        _header(
            "TensorRT headers",
            "TENSORRT_INCLUDE_DIR",
            "NvInfer.h",
            [
                "/usr/include/x86_64-linux-gnu",
                "/usr/include",
                "/usr/local/tensorrt/include",
                *_in_package("kernel_lens"),
            ],
            "pip install --no-deps kernel-lens==2.0.1, or set TENSORRT_INCLUDE_DIR",
            "the TensorRT plugin library",
        ),
        _header(
            "ONNX Runtime headers",
            "ONNXRUNTIME_INCLUDE_DIR",
            "onnxruntime_c_api.h",
            ["/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/include", "/usr/local/include"],
            "apt install libonnxruntime-dev, or set ONNXRUNTIME_INCLUDE_DIR to those of a release",
            "the ONNX Runtime operator library",
        ),
        _tool("nvcc", "CUDA toolkit: install it or pip install nvidia-cuda-nvcc", "CUDA kernels"),
        _tool("c++", "install g++ or clang++", "the native library"),
        _tool("cmake", "pip install cmake", "the native library"),
    ]


def _header(name: str, variable: str, file: str, folders: list[str], hint: str, enables: str) -> Finding:
    candidates = [os.environ.get(variable, ""), *folders]
    found = next((folder for folder in candidates if folder and (Path(folder) / file).is_file()), None)
    return Finding(name, "header", found is not None, found or hint, enables)


def _in_package(package: str) -> list[str]:
    spec = find_spec(package)
    roots = spec.submodule_search_locations if spec else None
    return [str(Path(root) / "include" / "tensorrt") for root in roots or ()]


def _tool(name: str, hint: str, enables: str) -> Finding:
    beside = Path(sys.executable).parent / name
    places = [shutil.which(name), str(beside) if beside.is_file() else None, f"/usr/local/cuda/bin/{name}"]
    found = next((place for place in places if place and Path(place).is_file()), None)
    return Finding(name, "tool", found is not None, found or hint, enables)


COMMAND = Command(
    name="doctor",
    summary="list runtimes, devices, headers and versions, and what each missing piece would enable",
    example="rankbook doctor --json",
    options=Common,
    run=run,
)
