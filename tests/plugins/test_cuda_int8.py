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
from rankbook.exporter import emit
from rankbook.plugins import int8, layout
from tests.op_cases import CASES, case_record, numpy_inputs
from tests.plugins import emulated
from tests.plugins.test_cuda_emulated import EPSILON, TORCH, from_bits, magnitudes, to_bits

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")


def activations(record: QuantizedLinear, dtype: str, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, record.in_features, generator=generator)
    x[0, : record.in_features // 2] *= 30  # groups of one token have scales of their own
    return x.to(TORCH[dtype])


def results(record: QuantizedLinear, x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the kernels give for x, and what the definition gives in float32."""
    attributes, inputs = emit.attributes(record.spec()), numpy_inputs(record)
    got = emulated.matmul(inputs, attributes, to_bits(x), dtype, int8=True)
    want = int8.codebook_matmul({"x": x.float().numpy(), **inputs}, attributes)
    return from_bits(got, dtype).double(), torch.from_numpy(np.asarray(want)).double()


def check(record: QuantizedLinear, dtype: str, tokens: int, *, rounded_weights: bool = False) -> None:
    """Compare with the definition.

    Allowed are 2**-24 of the sum of magnitudes for each float32 addition, and half a unit in the last place of the
    type of x. Where there is no integer kernel (``rounded_weights``) weights and activations are rounded to that type,
    and levels and factors that are not whole numbers are not rounded to steps of 1 / 127.
    """
    x = activations(record, dtype, tokens)
    got, want = results(record, x, dtype)
    error = (got - want).abs()
    a = x.double().abs()
    size = a @ magnitudes(record).T
    if record.low_rank is not None:
        size += (a @ record.low_rank.down.dense().double().abs().T) @ record.low_rank.up.dense().double().abs().T
    bound = size * EPSILON["float32"] * (record.in_features + 64) + want.abs() * EPSILON[dtype] + 1e-7
    if rounded_weights:
        steps = 2 / 254 if record.levels.is_floating_point() or record.low_rank is not None else 0
        bound += size * (EPSILON[dtype] * (record.params.shape[2] + 4) + steps)
    assert torch.isfinite(error).all()
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} times the bound"


# Inputs and group: whole steps of 64 (128 with 3 bits), half ones, groups of several, a last step that is not full.
GROUPS = ((128, 64), (192, 32), (480, 160), (384, 128), (512, 256), (96, 96), (448, 448))
GROUPS_3 = ((256, 128), (384, 64), (192, 64), (768, 256), (1024, 256), (96, 96), (448, 448))


@pytest.mark.parametrize(("bits", "planes"), list(product(layout.BITS, (1, 2, 3, 4))))
def test_widths_planes_groups_and_numbers_of_tokens(bits, planes):
    """Every width meets every number of planes; groups, tokens and types take turns."""
    tokens, dtypes = (1, 3, 16, 8, 1, 2, 11), tuple(TORCH)
    for i, (columns, group) in enumerate(GROUPS_3 if bits == 3 else GROUPS):
        changes: dict[str, Any] = {"bits": bits, "planes": planes, "in_features": columns, "group": group}
        changes |= {"out_features": 33 + 31 * (i % 2), "has_offset": i % 3 != 0, "bias": i % 2 == 0}
        count = tokens[(i + bits + planes) % len(tokens)]
        if planes > 2:
            count = min(count, 8 if group % (128 if bits == 3 else 64) == 0 else 1)
        check(case_record("plain", **changes, float_levels=i == 2), dtypes[(i + bits) % 3], count)


@pytest.mark.parametrize("tokens", [1, 5, 13])
@pytest.mark.parametrize("bits", layout.BITS)
def test_every_sum_is_an_exact_integer(bits, tokens):
    """With scales and steps of one every number is whole and below 2**24: no rounding anywhere, so no difference."""
    record = case_record("plain", bits=bits, planes=2, in_features=256, group=128, out_features=40, has_offset=True)
    codes, step, base = record.params.codes, record.params.step, record.params.base
    assert codes is not None
    assert step is not None
    assert base is not None
    codes = (codes.int() % 5 - 2).to(torch.int8)
    params = dataclasses.replace(record.params, codes=codes, step=torch.ones_like(step), base=torch.zeros_like(base))
    levels = (torch.arange(2 << bits).reshape(2, -1) * 37 % 256 - torch.tensor([[128], [0]])).half()
    record = dataclasses.replace(record, params=params, levels=levels)
    x = torch.randint(-127, 128, (tokens, 256), generator=torch.Generator().manual_seed(bits)).float()
    x[:, ::128] = 127  # the largest of each group, so that the scale is one
    got, want = results(record, x, "float32")
    assert (got == want).all()
    assert (want.abs() > 2**18).any()


@pytest.mark.parametrize("bits", layout.BITS)
def test_blocks_share_a_panel_of_long_rows(bits):
    for tokens, group in ((1, 64), (7, 128), (12, 2560)):
        record = case_record("plain", bits=bits, out_features=33, in_features=2560, group=group, rank=2, bias=True)
        check(record, "float16", tokens)


@pytest.mark.parametrize(("rank", "factor_bits"), [(1, 8), (4, 8), (9, 16), (40, 32)])
def test_error_branch(rank, factor_bits):
    for tokens in (1, 10):
        record = case_record("plain", rank=rank, factor_bits=factor_bits, in_features=256, group=128, bits=4)
        check(record, "float32", tokens)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("case", list(CASES))
def test_every_stored_form(case, dtype):
    """Most of these have groups or parameters without an integer kernel: x is rounded, the rest is done in its type."""
    check(case_record(case), dtype, tokens=3, rounded_weights=True)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_many_tokens(dtype):
    record = case_record("plain", bits=4, out_features=70, in_features=128, group=64, bias=True, rank=5)
    check(record, dtype, tokens=17, rounded_weights=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_activations_that_are_no_numbers_and_zeros(tokens):
    record = case_record("plain", bits=4, in_features=128, group=64)
    x = torch.ones(tokens, 128)
    x[0, 3] = torch.inf
    x[-1, 64:] = 1e-38  # rounds to zero
    got, want = results(record, x, "float32")
    assert torch.isnan(got[0]).all()
    assert torch.isnan(want[0]).all()
    if tokens > 1:
        assert torch.allclose(got[1:], want[1:], rtol=1e-6, atol=1e-6)
