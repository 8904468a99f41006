"""The CUDA kernels, run on the CPU from their own source over the emulation, agree with the numpy reference.

No GPU takes part. The emulation stops at every access outside the buffers, misaligned vector, write past the shared
memory, and at threads of a warp or block that do not all meet; uninitialized shared memory and scratch are NaN.
"""

from __future__ import annotations

import ctypes
import dataclasses
from itertools import product

import numpy as np
import pytest

from rankbook.plugins import layout
from tests.calibration.records import random_record
from tests.ops.cases import DTYPES, EPSILON, FORMS, Op, random_x
from tests.ops.runners import RUNNERS, check, run_kernels
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")


@pytest.mark.parametrize(("bits", "planes"), list(product(layout.BITS, (1, 2, 3, 4))))
def test_gather(bits, planes):
    record = random_record(bits=bits, planes=planes, out_features=70, in_features=80)
    check(RUNNERS["cuda"], Op.of(record, np.array([[0, 69, 31], [32, 7, 66]]), gather=True))


def test_gather_of_a_row_that_does_not_exist_is_nan():
    got = run_kernels(Op.of(FORMS["odd sizes"].draw().record, np.array([-1, 33, 32]), gather=True))
    assert np.isnan(got[:2]).all()
    assert np.isfinite(got[2]).all()


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, DTYPES)))
def test_dense(bits, dtype):
    for case in ("plain", "odd sizes", "fp16 params"):
        op = FORMS[case].draw(bits=bits)
        got = emulated.dense(op.constants(), op.attributes, dtype).view(DTYPES[dtype]).astype(np.float64)
        rows = Op.of(op.record, np.arange(op.record.out_features), gather=True)
        magnitude, _ = rows.magnitude
        assert (np.abs(got - op.record.weight().numpy()) <= magnitude * (EPSILON[dtype] + 4 * EPSILON["float32"])).all()


def test_levels_and_coefficients_of_any_magnitude_survive_fp16():
    """Levels far from 1 would overflow or vanish in fp16 products if the table did not divide them out."""
    record = random_record(float_levels=True)
    for factor in (2.0**-10, 2.0**9):
        step, base = record.params.step, record.params.base
        assert step is not None
        assert base is not None
        params = dataclasses.replace(record.params, step=step / factor * 16, base=base / factor * 16)
        scaled = dataclasses.replace(record, levels=(record.levels.float() * factor).half(), params=params)
        check(RUNNERS["cuda"], Op.of(scaled, random_x(scaled, "float16", (2,))))


@pytest.mark.skipif(emulated.ON_GPU, reason="a GPU does not report these errors; compute-sanitizer does")
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (0, "only a part of the threads"),
        (1, "only a part of the threads|different places"),
        (2, "write of 4 bytes outside all buffers by thread 16"),
        (3, "outside the shared memory"),
        (4, "different places"),
        (5, "outside the shared memory"),
    ],
)
def test_the_emulation_catches_broken_kernels(what, message):
    with pytest.raises(RuntimeError, match=message):
        emulated.broken(what)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 7}, "must divide"),
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"params_planes": 6}, "1 to 4 planes"),
        ({"rows": 0}, "no rows"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    op = FORMS["plain"].draw()
    arena = emulated.Arena()
    weight = emulated.packed_weight(arena, op.constants(), op.attributes)
    for name, value in changes.items():
        setattr(weight, name, value)
    arena.register()
    assert emulated.library().rb_dense(ctypes.byref(weight), None, 0) == 1
    assert message in emulated.library().rb_error().decode()
