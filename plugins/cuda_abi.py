"""The CUDA kernels as a C library: their structures, filled by whoever holds the buffers, and the calls.

The structures mirror ``csrc/kernels/cuda/params.h``; `Kernels` refuses a library whose structures have other sizes.
"""

from __future__ import annotations

import ctypes as c
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
"""Numbers of the types of x and y, and of stored floats."""

Address = Callable[[Any], int]
"""Returns the address of an array, of numpy or torch, where the kernels can read it."""


class Floats(c.Structure):
    """A floating-point tensor in one of two types."""

    _fields_ = [("data", c.c_void_p), ("type", c.c_int32)]


class PackedWeight(c.Structure):
    """A matrix (N, K) of codes with one codebook per row and group."""

    _fields_ = [
        ("codes", c.c_void_p),
        ("levels", c.c_void_p),
        ("params", c.c_void_p),
        ("step", Floats),
        ("base", c.c_void_p),
        ("params_full", c.c_bool),
        ("step_full", c.c_bool),
        ("base_full", c.c_bool),
        ("has_offset", c.c_bool),
        ("rows", c.c_int),
        ("columns", c.c_int),
        ("bits", c.c_int),
        ("groups", c.c_int),
        ("params_planes", c.c_int),
    ]


class Factor(c.Structure):
    """One factor of the error branch."""

    _fields_ = [("codes", c.c_void_p), ("scale", Floats), ("codes_full", c.c_bool), ("scale_full", c.c_bool)]


class Matmul(c.Structure):
    """``y = x W^T + (x down^T) up^T + bias``; of experts, with the layer of a stack that ``numbers`` says."""

    _fields_ = [
        ("weight", PackedWeight),
        ("bias", c.c_void_p),
        ("bias_full", c.c_bool),
        ("rank", c.c_int),
        ("down", Factor),
        ("up", Factor),
        ("x", c.c_void_p),
        ("y", c.c_void_p),
        ("type", c.c_int32),
        ("tokens", c.c_int),
        ("int8_activations", c.c_bool),
        ("experts", c.c_int),
        ("numbers", c.c_void_p),
        ("workspace", c.c_void_p),
    ]


class Gather(c.Structure):
    """Rows of W by their numbers."""

    _fields_ = [("weight", PackedWeight), ("indices", c.c_void_p), ("y", c.c_void_p), ("count", c.c_int64)]


def packed_weight(address: Address, tensors: Mapping[str, Any], attributes: Mapping[str, Any]) -> PackedWeight:
    """Fill the structure of a weight from the constants of an operator, by formal name; of experts they are stacks."""
    codes, params, step, base = (tensors[name] for name in ("codes", "params", "step", "base"))
    lead = _stack_axes(tensors)
    full = params if _count(params, lead) > 1 or step.shape[-1] != 32 else step
    return PackedWeight(
        codes=address(codes),
        levels=address(tensors["levels"]),
        params=address(params),
        step=_floats(address, step),
        base=address(base),
        params_full=params.shape[-1] == 32,
        step_full=step.shape[-1] == 32,
        base_full=_count(base, lead) > 1 or full.shape[-2] == 1,
        has_offset=bool(attributes["offset"]),
        rows=attributes["out_features"],
        columns=attributes["in_features"],
        bits=codes.shape[-3],
        groups=full.shape[-3],
        params_planes=full.shape[-2],
    )


def factor(address: Address, tensors: Mapping[str, Any], name: str, axis: int) -> Factor:
    """Fill the structure of a factor of the error branch: ``down`` with the ranks in rows (axis 1), ``up`` (axis 0)."""
    codes, scale = tensors[name], tensors[f"{name}_scale"]
    lead = _stack_axes(tensors)
    return Factor(
        codes=address(codes),
        scale=_floats(address, scale),
        codes_full=_count(codes, lead) > 1,
        scale_full=scale.shape[lead + axis] > 1,
    )


def product(address: Address, tensors: Mapping[str, Any], attributes: Mapping[str, Any]) -> Matmul:
    """Fill the structure of a product but for x, y, their type and number, numbers of experts, and the workspace."""
    lead = _stack_axes(tensors)
    arguments = Matmul(
        weight=packed_weight(address, tensors, attributes),
        bias=address(tensors["bias"]),
        bias_full=_count(tensors["bias"], lead) > 1,
        rank=tensors["up_scale"].shape[-1] if "up_scale" in tensors else 0,
        experts=tensors["codes"].shape[0] if lead else 0,
    )
    if arguments.rank:
        arguments.down = factor(address, tensors, "down", 1)
        arguments.up = factor(address, tensors, "up", 0)
    return arguments


class Kernels:
    """The kernels in a library that exports ``rankbook_cuda_*``."""

    def __init__(self, path: Path) -> None:
        """Load the library; no GPU is asked for.

        Raises:
            OSError: It cannot be loaded.
            RuntimeError: It was built from other sources than this module.
        """
        library = c.CDLL(str(path))
        if not hasattr(library, "rankbook_cuda_size"):
            raise RuntimeError(
                f"{path.name} has no C interface: it is older than this package; build or install it anew"
            )
        library.rankbook_cuda_size.restype = c.c_size_t
        for mirror in (Floats, PackedWeight, Factor, Matmul, Gather):
            if (size := library.rankbook_cuda_size(mirror.__name__.encode())) != c.sizeof(mirror):
                raise RuntimeError(
                    f"{path.name} holds {mirror.__name__} in {size} bytes, this package in {c.sizeof(mirror)}: they are"
                    " of different versions; build or install the library anew"
                )
        library.rankbook_cuda_workspace.restype = c.c_size_t
        self._library = library
        for name in ("rankbook_cuda_matmul", "rankbook_cuda_gather"):
            getattr(library, name).restype = c.c_char_p

    def workspace(self, arguments: Matmul) -> int:
        """Return the bytes of scratch that a product of these sizes needs."""
        return int(self._library.rankbook_cuda_workspace(c.byref(arguments)))

    def matmul(self, arguments: Matmul, stream: int) -> None:
        """Enqueue a product on a CUDA stream.

        Raises:
            RuntimeError: The kernels refuse it.
        """
        self._call("rankbook_cuda_matmul", arguments, stream)

    def gather(self, arguments: Gather, stream: int) -> None:
        """Enqueue a look-up of rows on a CUDA stream.

        Raises:
            RuntimeError: The kernels refuse it.
        """
        self._call("rankbook_cuda_gather", arguments, stream)

    def _call(self, name: str, arguments: c.Structure, stream: int) -> None:
        message = getattr(self._library, name)(c.byref(arguments), c.c_void_p(stream))
        if message is not None:
            raise RuntimeError(message.decode())


def _floats(address: Address, values: Any) -> Floats:
    return Floats(address(values), TYPES[str(values.dtype).removeprefix("torch.")])


def _stack_axes(tensors: Mapping[str, Any]) -> int:
    """Return how many axes stand before those of one layer: that of the experts, or none."""
    return len(tensors["codes"].shape) - 5


def _count(values: Any, lead: int) -> int:
    """Return the number of elements of one layer."""
    return math.prod(int(size) for size in values.shape[lead:])
