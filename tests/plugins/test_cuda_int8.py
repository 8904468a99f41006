"""The CUDA kernels for rounded activations, run on the CPU over the emulation, against plugins/int8.py.

Dot products are exact integers on both sides. What may differ is the order in which a few hundred float32 terms are
added, and the last rounding to the type of x; see `check`.
"""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import layout
from tests.calibration.records import random_record
from tests.ops.cases import DTYPES, Op, random_x
from tests.ops.runners import RUNNERS, check, run_kernels
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")


def compare(record: QuantizedLinear, dtype: str, tokens: int) -> None:
    """Check the kernels on activations whose groups have scales of their own."""
    x = random_x(record, "float32", (tokens,), seed=tokens)
    x[0, : record.in_features // 2] *= 30
    check(RUNNERS["cuda"], Op.of(record, x.astype(DTYPES[dtype]), int8_activations=True))


# Inputs and group: whole steps of 64 (128 with 3 bits), half ones, groups of several, a last step that is not full.
GROUPS = ((128, 64), (192, 32), (480, 160), (384, 128), (512, 256), (96, 96), (448, 448))
GROUPS_3 = ((256, 128), (384, 64), (192, 64), (768, 256), (1024, 256), (96, 96), (448, 448))


@pytest.mark.parametrize(("bits", "planes"), list(product(layout.BITS, (1, 2, 3, 4))))
def test_widths_planes_groups_and_numbers_of_tokens(bits, planes):
    """Every width meets every number of planes; groups, tokens and types take turns."""
    tokens, dtypes = (1, 3, 16, 8, 1, 2, 11), tuple(DTYPES)
    for i, (columns, group) in enumerate(GROUPS_3 if bits == 3 else GROUPS):
        changes: dict[str, Any] = {"bits": bits, "planes": planes, "in_features": columns, "group": group}
        changes |= {"out_features": 33 + 31 * (i % 2), "has_offset": i % 3 != 0, "bias": i % 2 == 0}
        count = tokens[(i + bits + planes) % len(tokens)]
        if planes > 2:
            count = min(count, 8 if group % (128 if bits == 3 else 64) == 0 else 1)
        compare(random_record(**changes, float_levels=i == 2), dtypes[(i + bits) % 3], count)


@pytest.mark.parametrize("tokens", [1, 5, 13])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_sum_is_an_exact_integer(bits, tokens):
    """With scales and steps of one every number is whole and below 2**24: no rounding anywhere, so no difference."""
    record = random_record(bits=bits, planes=2, in_features=256, group=128, out_features=40, has_offset=True)
    codes, step, base = record.params.codes, record.params.step, record.params.base
    assert codes is not None
    assert step is not None
    assert base is not None
    codes = (codes.int() % 5 - 2).to(torch.int8)
    params = dataclasses.replace(record.params, codes=codes, step=torch.ones_like(step), base=torch.zeros_like(base))
    levels = (torch.arange(2 << bits).reshape(2, -1) * 37 % 256 - torch.tensor([[128], [0]])).half()
    record = dataclasses.replace(record, params=params, levels=levels)
    x = np.random.default_rng(bits).integers(-127, 128, (tokens, 256)).astype(np.float32)
    x[:, ::128] = 127  # the largest of each group, so that the scale is one
    op = Op.of(record, x, int8_activations=True)
    want = op.expected()
    np.testing.assert_array_equal(run_kernels(op), want)
    assert (np.abs(want) > 2**18).any()


@pytest.mark.parametrize(("rank", "factor_bits"), [(1, 8), (4, 8), (9, 16), (40, 32)])
def test_error_branch(rank, factor_bits):
    record = random_record(rank=rank, factor_bits=factor_bits, in_features=256, group=128, bits=4)
    for tokens in (1, 10):
        compare(record, "float32", tokens)


@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_that_are_no_numbers_and_zeros(tokens):
    record = random_record(bits=4, in_features=128, group=64)
    x = np.ones((tokens, 128), np.float32)
    x[0, 3] = np.inf
    x[-1, 64:] = 1e-38  # rounds to zero
    op = Op.of(record, x, int8_activations=True)
    got, want = run_kernels(op), op.expected()
    assert np.isnan(got[0]).all()
    assert np.isnan(want[0]).all()
    if tokens > 1:
        np.testing.assert_allclose(got[1:], want[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("columns", "tokens"), [(1024, 1), (2080, 3), (1040, 17)])
def test_a_block_rounds_a_group_that_is_a_long_row(columns, tokens):
    """1040 columns: the last piece is not full; 17 tokens: rounded in place."""
    compare(random_record(bits=4, in_features=columns, group=columns, rank=3, out_features=40), "float16", tokens)
