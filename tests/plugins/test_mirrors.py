"""Structures of the CUDA kernels that tests fill through ctypes are those of C++."""

from __future__ import annotations

import ctypes as c

import pytest

from tests.plugins import emulated
from tests.plugins.ptx import launches, launches_int8

MIRRORS: tuple[type[c.Structure], ...] = (
    *(emulated.Floats, emulated.PackedWeight, emulated.Factor, emulated.Matmul, emulated.Gather),
    *(
        launches.MatmulKernel,
        launches.DenseKernel,
        launches.PrefillKernel,
        launches.ExpertKernel,
        launches_int8.Int8Plan,
        launches_int8.Int8Kernel,
        launches_int8.RoundKernel,
    ),
)


@pytest.mark.skipif(emulated.ON_GPU or emulated.compiler() is None, reason="needs the emulation: a C++ compiler")
@pytest.mark.parametrize("mirror", MIRRORS, ids=lambda mirror: mirror.__name__)
def test_a_structure_has_the_size_of_its_mirror(mirror: type[c.Structure]) -> None:
    """A field that only one side has moves the end, whatever the kernels make of it."""
    size = emulated.library().rb_size
    size.restype = c.c_size_t
    assert size(mirror.__name__.encode()) == c.sizeof(mirror)
    assert size(b"no such structure") == 0
