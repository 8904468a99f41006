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
import torch

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.exporter import emit
from rankbook.plugins import contract, layout
from tests.op_cases import CASES, case_record, expected, numpy_inputs
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")

EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# (out_features, in_features, group): odd sizes, one group per row, groups of a half block, groups across units and
# warps, more steps than warps.
SHAPES = [(33, 50, 50), (1, 16, 16), (70, 96, 48), (32, 144, 16), (40, 640, 160), (65, 24, 24)]


def to_bits(x: torch.Tensor) -> np.ndarray:
    return x.numpy() if x.dtype == torch.float32 else x.view(torch.int16).numpy().view(np.uint16)


def from_bits(values: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "float32":
        return torch.from_numpy(values)
    return torch.from_numpy(values.view(np.int16)).view(TORCH[dtype])


def magnitudes(record: QuantizedLinear) -> torch.Tensor:
    """(N, K): sum over planes of |coefficient * level|, plus |offset|: what rounding errors of a weight scale with."""
    params = record.params.dense().abs()
    table = params[..., : record.planes] @ record.levels.float().abs()
    if record.has_offset:
        table = table + params[..., record.planes :]
    grouped = record.codes.view(record.out_features, -1, record.group).long()
    return table.gather(2, grouped).view(record.out_features, record.in_features).double()


def check_matmul(record: QuantizedLinear, dtype: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, record.in_features, generator=generator).to(TORCH[dtype])
    got = emulated.matmul(numpy_inputs(record), emit.attributes(record.spec()), to_bits(x), dtype)
    want = torch.from_numpy(expected(record, x.float().numpy())).double()
    error = (from_bits(got, dtype).double() - want).abs()
    # Weights: one rounding per plane, the offset and the coefficients, in the type of x. Sums in fp32: one rounding
    # per term. The result: one rounding in the type of x.
    a = x.double().abs()
    weights = a @ magnitudes(record).T
    branch: torch.Tensor = torch.zeros(())
    if record.low_rank is not None:
        branch = (a @ record.low_rank.down.dense().double().abs().T) @ record.low_rank.up.dense().double().abs().T
    bound = weights * EPSILON[dtype] * (record.params.shape[2] + 3) + want.abs() * EPSILON[dtype]
    bound += (weights + branch) * EPSILON["float32"] * (record.in_features + 16) + 1e-6
    assert torch.isfinite(error).all()
    assert (error <= bound).all(), f"worst error is {(error / bound).max():.2f} times the bound"


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("case", list(CASES))
def test_every_stored_form(case, dtype):
    check_matmul(case_record(case), dtype, tokens=3)


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, TORCH)))
def test_shapes_planes_and_numbers_of_tokens(bits, dtype):
    """Every shape, plane count and token count meets every width and type, though not every one of the others."""
    tokens = (1, 2, 5, 8, 9, 16)
    for i, (rows, columns, group) in enumerate(SHAPES):
        planes = 1 + (i + bits) % 4
        changes = {"out_features": rows, "in_features": columns, "group": group, "bits": bits, "planes": planes}
        record = case_record("plain", **changes, has_offset=i % 2 == 0, bias=i % 3 == 0, float_levels=i % 3 == 1)
        check_matmul(record, dtype, tokens=tokens[(i + bits) % len(tokens)])


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, TORCH)))
def test_blocks_share_a_panel_of_long_rows(bits, dtype):
    """Rows this long are divided among blocks; the last one to arrive adds up what all have left."""
    for tokens, group in ((1, 64), (7, 128), (12, 2560)):
        record = case_record("plain", bits=bits, out_features=33, in_features=2560, group=group, rank=2, bias=True)
        check_matmul(record, dtype, tokens)


@pytest.mark.parametrize(("bits", "group"), [(3, 16), (3, 48), (3, 80), (2, 16), (2, 48), (4, 80), (4, 16), (8, 16)])
def test_groups_that_cut_steps_and_units(bits, group):
    record = case_record("plain", bits=bits, out_features=40, in_features=480, group=group, planes=2, has_offset=True)
    for dtype in ("float16", "bfloat16"):
        check_matmul(record, dtype, tokens=3)


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, TORCH)))
def test_many_tokens(bits, dtype):
    """Above 16 tokens; tiles are cut by tokens, rows and inputs here. With 3 planes the weight goes through scratch."""
    for planes, tokens in ((2, 17), (1, 70), (3, 17)):
        record = case_record(
            "plain", bits=bits, planes=planes, out_features=70, in_features=96, group=32, bias=True, rank=5
        )
        check_matmul(record, dtype, tokens)


@pytest.mark.parametrize("bits", layout.BITS)
def test_many_tokens_of_long_rows(bits):
    """More steps than wait in shared memory at once, more panels than a block has warps, groups of several forms."""
    for group, dtype in ((32 if bits == 3 else 16, "float16"), (64, "bfloat16"), (640, "float16")):
        record = case_record("plain", bits=bits, out_features=300, in_features=640, group=group, planes=1, bias=True)
        check_matmul(record, dtype, tokens=20)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_many_tokens_with_odd_sizes(dtype):
    record = case_record("odd sizes", rank=3, factor_bits=16)
    check_matmul(record, dtype, tokens=131)


@pytest.mark.parametrize("rank", [1, 4, 9, 40])
def test_ranks_of_the_error_branch(rank):
    for dtype, tokens in product(TORCH, (1, 11)):
        check_matmul(case_record("plain", rank=rank, in_features=80, group=16), dtype, tokens)


@pytest.mark.parametrize(("bits", "planes"), list(product(layout.BITS, (1, 2, 3, 4))))
def test_gather(bits, planes):
    record = case_record("plain", bits=bits, planes=planes, out_features=70, in_features=80, group=16)
    indices = np.array([[0, 69, 31], [32, 7, 66]])
    constants = numpy_inputs(record, contract.GATHER)
    got = emulated.gather(constants, emit.attributes(record.spec()), indices)
    # Both sides work in fp32; they differ in the order of a sum over planes.
    np.testing.assert_allclose(got, expected(record, indices, contract.GATHER), rtol=0, atol=2e-6)


def test_gather_of_a_row_that_does_not_exist_is_nan():
    record = case_record("odd sizes")
    constants = numpy_inputs(record, contract.GATHER)
    got = emulated.gather(constants, emit.attributes(record.spec()), np.array([-1, 33, 32]))
    assert np.isnan(got[:2]).all()
    assert np.isfinite(got[2]).all()


@pytest.mark.parametrize(("bits", "dtype"), list(product(layout.BITS, TORCH)))
def test_dense(bits, dtype):
    for case in ("plain", "odd sizes", "fp16 params"):
        record = case_record(case, bits=bits)
        got = emulated.dense(numpy_inputs(record), emit.attributes(record.spec()), dtype)
        error = (from_bits(got, dtype).double() - record.weight().double()).abs()
        assert (error <= magnitudes(record) * (EPSILON[dtype] + 4 * EPSILON["float32"])).all()


def test_levels_and_coefficients_of_any_magnitude_survive_fp16():
    """Levels far from 1 would overflow or vanish in fp16 products if the table did not divide them out."""
    record = case_record("plain", float_levels=True)
    for factor in (2.0**-10, 2.0**9):
        step, base = record.params.step, record.params.base
        assert step is not None
        assert base is not None
        params = dataclasses.replace(record.params, step=step / factor * 16, base=base / factor * 16)
        scaled = dataclasses.replace(record, levels=(record.levels.float() * factor).half(), params=params)
        check_matmul(dataclasses.replace(scaled, has_offset=True), "float16", tokens=2)


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
    record = case_record("plain")
    arena = emulated.Arena()
    weight = emulated.packed_weight(arena, numpy_inputs(record), emit.attributes(record.spec()))
    for name, value in changes.items():
        setattr(weight, name, value)
    arena.register()
    assert emulated.library().rb_dense(ctypes.byref(weight), None, 0) == 1
    assert message in emulated.library().rb_error().decode()
