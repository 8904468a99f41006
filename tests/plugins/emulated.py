"""The CUDA kernels on the CPU: builds them over the emulation with the C++ compiler and calls them through ctypes.

With ``RANKBOOK_KERNELS_ON=gpu`` nvcc builds them and the same calls run on the GPU (``make test-gpu``).
"""

from __future__ import annotations

import ctypes as c
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock

from rankbook.plugins import cuda_abi
from rankbook.plugins.cuda_abi import TYPES as TYPES
from rankbook.plugins.cuda_abi import Factor as Factor
from rankbook.plugins.cuda_abi import Floats as Floats
from rankbook.plugins.cuda_abi import Gather as Gather
from rankbook.plugins.cuda_abi import Matmul as Matmul
from rankbook.plugins.cuda_abi import PackedWeight as PackedWeight
from rankbook.tools.dev import kernel_library
from rankbook.tools.dev.kernel_library import CSRC as CSRC
from rankbook.tools.dev.kernel_library import ROOT as ROOT
from rankbook.tools.dev.kernel_library import UNITS, compile_into, digest

SOURCES = (*UNITS, "emulation/simt.cpp", "emulation/library.cpp")
ALIGNMENT = 256
ON_GPU = os.environ.get("RANKBOOK_KERNELS_ON") == "gpu"
EXTRA_FLAGS = os.environ.get("RANKBOOK_EMULATION_FLAGS", "").split()
"""More flags for the compiler, e.g. sanitizers (test_trt_plugin.py)."""

Array = np.ndarray[Any, Any]
_failures: dict[str, str] = {}


@cache
def library() -> c.CDLL:
    """Build (once per state of the sources) and load the emulated kernels."""
    if ON_GPU:
        compiler()  # for its sentence
        lib = c.CDLL(str(kernel_library.build(kernel_library.present_architecture())))
    else:
        lib = c.CDLL(str(build("emulation", SOURCES)))
    lib.rb_error.restype = c.c_char_p
    lib.rb_workspace.restype = c.c_size_t
    if ON_GPU:
        lib.rb_upload.restype = c.c_void_p
    return lib


def _files() -> list[Path]:
    kinds = (".h", ".cuh", ".cu", ".cpp")
    return sorted(p for p in CSRC.rglob("*") if p.suffix in kinds and "cpu" not in p.parts)


def compiler() -> str | None:
    """Return the C++ compiler, or None, for which tests are skipped.

    Raises:
        RuntimeError: There is none, and the tests were asked to run on a GPU: skipping them would look like success.
    """
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None and ON_GPU:
        raise RuntimeError("RANKBOOK_KERNELS_ON=gpu, but there is no C++ compiler for nvcc: set CXX to one")
    return found


def build(name: str, sources: Sequence[str | Path], includes: Sequence[Path] = ()) -> Path:
    """Compile sources (relative to csrc, or absolute) over the emulation into a library; what is there already is kept.

    Raises:
        RuntimeError: The compiler's messages.
    """
    if name in _failures:
        raise RuntimeError(_failures[name])
    marks = hashlib.sha256(" ".join(EXTRA_FLAGS).encode()).hexdigest()[:6] if EXTRA_FLAGS else ""
    folder = ROOT / "build" / "emulation" / (digest(*_files()) + marks)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"lib{name}-{digest(*(CSRC / source for source in sources))}.so"
    try:
        with FileLock(folder / "lock"):  # another test process may want the same: it finds what this one has built
            if not target.exists():
                _build(target, sources, includes)
    except RuntimeError as error:
        _failures[name] = str(error)  # the next test must not try again
        raise
    return target


def _build(target: Path, sources: Sequence[str | Path], includes: Sequence[Path]) -> None:
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [
        *EXTRA_FLAGS,
        "-DRANKBOOK_EMULATION",
        f"-I{CSRC}",
        *(f"-isystem{path}" for path in includes),
        "-x",
        "c++",
        "-c",
    ]
    objects = [target.parent / f"{Path(source).stem}-{digest(CSRC / source)}.o" for source in sources]
    steps = [
        ([str(compiler()), *flags, str(CSRC / source)], out)
        for source, out in zip(sources, objects, strict=True)
        if not out.exists()
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda step: compile_into(*step), steps))
    compile_into([str(compiler()), *EXTRA_FLAGS, "-shared", *map(str, objects)], target)


class Memory(Protocol):
    """What holds the buffers of a launch."""

    def add(self, values: Array, *, writable: bool = False) -> int:
        """Copy an array and return its address."""
        ...


class Arena:
    """Buffers that kernels may touch, everything around them forbidden (on a GPU: up to the driver's granularity)."""

    def __init__(self) -> None:
        self._arrays: list[tuple[Array, bool]] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._device: dict[int, Array] = {}  # on a GPU: the shape of what lies at an address
        self._borrowed: dict[int, Array] = {}

    def __del__(self) -> None:
        for address in self._device:
            library().rb_free(c.c_void_p(address))

    def add(self, values: Array, *, writable: bool = False) -> int:
        """Copy an array to an aligned address of its own and return the address."""
        if ON_GPU:
            data = np.ascontiguousarray(values)
            address = library().rb_upload(c.c_void_p(data.ctypes.data), c.c_size_t(data.nbytes))
            if not address:
                raise RuntimeError(library().rb_error().decode())
            self._device[address] = data
            return int(address)
        raw = np.empty(values.nbytes + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        view = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        view[...] = values
        self._arrays.append((view, writable))
        return int(view.ctypes.data)

    def adopt(self, other: Arena) -> None:
        """Let kernels touch what another arena, which lives longer, holds as well."""
        self._arrays += other._arrays
        self._borrowed |= other._device

    def array(self, address: int) -> Array:
        """Return the array at an address given by `add`."""
        if ON_GPU:
            found = np.empty_like((self._device | self._borrowed)[address])
            if library().rb_download(c.c_void_p(found.ctypes.data), c.c_void_p(address), c.c_size_t(found.nbytes)):
                raise RuntimeError(library().rb_error().decode())
            return found
        return next(view for view, _ in self._arrays if view.ctypes.data == address)

    def keep_parts(self, stacks: Iterable[Array], parts: Sequence[int]) -> None:
        """Allow, of the buffers that hold these arrays, only some parts along the first axis."""
        held = [stack.tobytes() for stack in stacks]
        self._parts = {
            view.ctypes.data: tuple(parts) for view, flag in self._arrays if not flag and view.tobytes() in held
        }

    def _allowed(self) -> Iterator[tuple[int, int, int]]:
        """Yield the address, size and whether it may be written of every range that may be touched."""
        for view, writable in self._arrays:
            parts = self._parts.get(view.ctypes.data)
            for array in [view] if parts is None else [view[part] for part in parts]:
                yield array.ctypes.data, array.nbytes, int(writable)

    def register(self, lib: c.CDLL | None = None) -> None:
        """Tell an emulation which addresses are allowed."""
        if ON_GPU and lib is None:
            return
        begins, sizes, writable = zip(*self._allowed(), strict=True)
        count = len(begins)
        (lib or library()).rb_buffers(
            (c.c_size_t * count)(*begins), (c.c_size_t * count)(*sizes), (c.c_int * count)(*writable), count
        )


def packed_weight(arena: Memory, tensors: Mapping[str, Array], attributes: Mapping[str, Any]) -> PackedWeight:
    """Fill the argument structure from the constants of an operator."""
    return cuda_abi.packed_weight(arena.add, tensors, attributes)


class Product:
    """A product on x (M, K), float32 or 16-bit floats as uint16 bits, ready to run any number of times.

    Args:
        tensors: Constants of the operator.
        attributes: Its attributes.
        x: Activations.
        dtype: Their type.
        int8: Whether x is rounded to 8 bits inside.
        numbers: Of the expert of each token (M,), where the constants are stacks.
    """

    def __init__(
        self,
        tensors: Mapping[str, Array],
        attributes: Mapping[str, Any],
        x: Array,
        dtype: str,
        *,
        int8: bool = False,
        numbers: Array | None = None,
    ) -> None:
        self.arena = arena = Arena()
        self.arguments = cuda_abi.product(arena.add, tensors, attributes)
        self._y = arena.add(np.full((len(x), self.arguments.weight.rows), -1).astype(x.dtype), writable=True)
        self.arguments.x, self.arguments.y, self.arguments.type = arena.add(x), self._y, TYPES[dtype]
        self.arguments.tokens, self.arguments.int8_activations = len(x), int8
        if numbers is not None:
            self.arguments.numbers = arena.add(numbers)
        self.workspace_bytes = library().rb_workspace(c.byref(self.arguments))
        if self.workspace_bytes:
            self.arguments.workspace = arena.add(np.full(self.workspace_bytes, 0xFF, np.uint8), writable=True)

    def run(self) -> Array:
        """Return y (M, N) in the form of x. The workspace is what the last run left there, and NaN before the first.

        Raises:
            RuntimeError: The sentence of the kernels, or of the emulation.
        """
        _call("rb_matmul", self.arena, c.byref(self.arguments))
        return self.arena.array(self._y).copy()


def matmul(tensors: Mapping[str, Array], attributes: Mapping[str, Any], x: Array, dtype: str, **options: Any) -> Array:
    """Run a product once; see `Product`."""
    return Product(tensors, attributes, x, dtype, **options).run()


def several(products: Sequence[Product]) -> tuple[list[Array], int]:
    """Run products of equal x in one call; return their y and how many kernels that took.

    Raises:
        RuntimeError: The sentence of the kernels, or of the emulation.
    """
    arena = Arena()  # of all of them together
    for product in products:
        arena.adopt(product.arena)
    all_ = (Matmul * len(products))(*(product.arguments for product in products))
    for each in all_:
        each.x = all_[0].x
    lib = library()
    lib.rb_workspace_of_several.restype = c.c_size_t
    size = lib.rb_workspace_of_several(all_, len(products))
    all_[0].workspace = arena.add(np.full(size, 0xFF, np.uint8), writable=True) if size else None
    if not ON_GPU:
        lib.rb_launches()
    _call("rb_several", arena, all_, len(products))
    return [arena.array(each.y).copy() for each in all_], 0 if ON_GPU else lib.rb_launches()


def gather(tensors: Mapping[str, Array], attributes: Mapping[str, Any], indices: Array) -> Array:
    """Look up rows (..., K) float32."""
    arena = Arena()
    weight = packed_weight(arena, tensors, attributes)
    y = arena.add(np.zeros((*indices.shape, weight.columns), np.float32), writable=True)
    _call("rb_gather", arena, c.byref(Gather(weight, arena.add(indices.astype(np.int64)), y, indices.size)))
    return arena.array(y).copy()


def dense(tensors: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str) -> Array:
    """Decode the weight (N, K) to float32, or to 16-bit floats as uint16 bits."""
    arena = Arena()
    weight = packed_weight(arena, tensors, attributes)
    stored = np.float32 if dtype == "float32" else np.uint16
    y = arena.add(np.zeros((weight.rows, weight.columns), stored), writable=True)
    _call("rb_dense", arena, c.byref(weight), c.c_void_p(y), TYPES[dtype])
    return arena.array(y).copy()


def broken(what: int) -> None:
    """Run one of the kernels that the emulation must refuse."""
    arena = Arena()
    y = arena.add(np.zeros(16, np.float32), writable=True)
    _call("rb_broken", arena, what, c.c_void_p(y))


class Kernels:
    """The emulation as `rankbook.calibration.model.packed_ops.KernelLibrary`; kernels may touch all memory."""

    def workspace(self, arguments: Matmul) -> int:
        """Return the bytes of scratch of a product."""
        return int(library().rb_workspace(c.byref(arguments)))

    def matmul(self, arguments: Matmul, stream: int) -> None:
        """Compute a product."""
        assert stream == 0
        self._run("rb_matmul", arguments)

    def gather(self, arguments: Gather, stream: int) -> None:
        """Look up rows."""
        assert stream == 0
        self._run("rb_gather", arguments)

    def _run(self, name: str, arguments: c.Structure) -> None:
        library().rb_buffers((c.c_size_t * 1)(0), (c.c_size_t * 1)(2**62), (c.c_int * 1)(1), 1)
        if getattr(library(), name)(c.byref(arguments)):
            raise RuntimeError(library().rb_error().decode())


def _call(name: str, arena: Arena, *arguments: Any) -> None:
    arena.register()
    if getattr(library(), name)(*arguments):
        raise RuntimeError(library().rb_error().decode())
