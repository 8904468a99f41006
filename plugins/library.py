"""Finds the native libraries. In a wheel and in an editable install they lie in ``lib`` beside this file.

ONNX Runtime::

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("rankbook.activations", "int8")  # before the next line; without it: exact, slower
    options.register_custom_ops_library(str(rankbook.plugins.library.library("ort")))

The entry ``rankbook.memory`` = ``mapped`` uses weights where they are instead of copying them once to huge pages, which
is a third slower where the processor must walk tables of small pages, and saves memory where the file is not mapped.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

ACTIVATIONS = ("fp32", "int8")
"""Values of the session configuration entry `ACTIVATIONS_ENTRY`; int8 is defined in `rankbook.plugins.int8`."""
ACTIVATIONS_ENTRY = "rankbook.activations"

_FILES = {"ort": "librankbook_ort.so", "ort-cuda": "librankbook_ort_cuda.so", "trt": "librankbook_trt.so"}
_FILES |= {f"aot-{bits}": f"aot_{bits}.ptx" for bits in (2, 3, 4, 8)}  # of layout.py, which would load numpy
_TARGETS = dict.fromkeys(_FILES, "make native-cuda") | {"ort": "make native"}
_FOLDER = Path(__file__).parent / "lib"


def unavailable(runtime: str) -> str | None:
    """Return why there is no native library for ``runtime``, with what to do about it, or None if there is one.

    Raises:
        ValueError: No library is made for this runtime.
    """
    path = _path(runtime)
    if path.is_file():
        return None
    return f"{path.name} is not built: run `{_TARGETS[runtime]}` in the checkout, or install a wheel that holds it"


def library(runtime: str) -> Path:
    """Return the native library for ``runtime``.

    Args:
        runtime: ``"ort"``: give the path to ``register_custom_ops_library``; ``"ort-cuda"``: the same with operators
            for the CUDA execution provider as well; ``"trt"``: to ``load_library`` of TensorRT's plugin registry;
            ``"aot-4"``, ``"aot-2"``, ...: PTX for one width (`rankbook.plugins.aot`).

    Raises:
        ValueError: No library is made for this runtime.
        FileNotFoundError: It is not built; the message says how to.
    """
    reason = unavailable(runtime)
    if reason is not None:
        raise FileNotFoundError(reason)
    return _path(runtime)


def native_info(runtime: str) -> dict[str, str | int]:
    """Return what the library says about itself.

    These are ``isa`` and ``isa_int8`` (instruction sets chosen here), ``ort_api``,
    ``copied_bytes`` (constants that open sessions hold as copies on huge pages), ``cuda`` (``not built``, the number of
    devices, or why there is none). Libraries for ONNX Runtime only.

    Raises:
        ValueError: No library is made for this runtime.
        FileNotFoundError: It is not built.
    """
    describe = ctypes.CDLL(str(library(runtime))).rankbook_native_info
    describe.restype = ctypes.c_char_p
    info: dict[str, str | int] = json.loads(describe())
    return info


def _path(runtime: str) -> Path:
    if runtime not in _FILES:
        raise ValueError(f"there is no native library for {runtime!r}; choose one of {tuple(_FILES)}")
    return _FOLDER / _FILES[runtime]
