"""A second device for tests: PyTorch's slot for devices of others, computed on the CPU (`backend.cpp`).

Tensors of it and of the CPU in one operation raise, as with CUDA. Registering a device changes the process for good
(the threads of autograd are made for the devices there are), so `process` runs functions in one of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import multiprocessing
import os
import subprocess
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.plugins import emulated

NAME = "second"
SOURCE = Path(__file__).parent / "backend.cpp"
FOLDER = Path(__file__).parents[2] / "build" / "second-device"


def build() -> Path:
    """Compile the backend against the headers of the installed PyTorch; what is there already is kept.

    Raises:
        RuntimeError: The compiler's messages.
    """
    import torch
    from torch.utils import cpp_extension

    mark = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    target = FOLDER / f"libsecond-{mark}.so"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait for it
        if target.exists():
            return target
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        (libraries,) = cpp_extension.library_paths()
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        partial = target.with_suffix(".partial")
        command = [str(emulated.compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", abi]
        command += [*includes, str(SOURCE), "-o", str(partial), f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        partial.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """Make PyTorch of this process know the device, named ``second``."""
    import torch
    from torch.utils import backend_registration

    path = build()
    backend_registration.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 8,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    torch._register_device_module(NAME, module)
    found = ctypes.CDLL(str(path))
    found.second_register()
    return found


@contextlib.contextmanager
def limited(more: int) -> Iterator[None]:
    """Let allocations fail that need more than ``more`` bytes beyond what is taken now."""
    backend = library()
    backend.second_used.restype = ctypes.c_size_t
    backend.second_limit(ctypes.c_size_t(backend.second_used() + more))
    try:
        yield
    finally:
        backend.second_limit(ctypes.c_size_t(2**64 - 1))


def process() -> ProcessPoolExecutor:
    """Return one process that has the device, for functions of modules that can be imported there."""
    # Few threads: the suite runs in several processes already. And MKL sums in one order wherever a tensor lies, so
    # that two runs can be compared to the bit.
    settings = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)
        pool.submit(os.getpid).result()  # begun: it has the environment
    return pool


def _begin() -> None:
    library()
    atexit.register(os._exit, 0)  # the threads of autograd for this device would end the process with a message
