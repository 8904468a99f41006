"""Every combination of operator, bits, planes, group, type and number of tokens, over the emulation.

The other tests of the CUDA kernels let these take turns and vary what is fixed here: one panel of 29 rows of 256
inputs, int8 parameters with an offset, int8 levels, a bias, error branches of rank 2 in int8. Numbers of tokens are one
of each form of a kernel: a single one, up to 8, up to 16 and more. Bounds are those of the other tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.exporter import emit
from rankbook.plugins import contract, layout
from tests.op_cases import case_record, expected, numpy_inputs
from tests.plugins import emulated, test_cuda_emulated, test_cuda_int8

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")

COLUMNS = 256
PLANES = (1, 2, 3, 4)
GROUPS = (16, 32, 64, 128, 256)
TOKENS = (1, 5, 13, 17)
Case = tuple[str, Callable[[], None]]


def has_integer_kernel(record: QuantizedLinear, tokens: int) -> bool:
    """Say whether rounded activations go to integer tensor cores; else x is rounded and computed with in its type."""
    step = 128 if record.bits == 3 else 64
    whole = record.group in (COLUMNS, *range(step, COLUMNS, step))
    if tokens > 16 or not (whole or record.group % (step // 2) == 0):
        return False
    return record.planes <= 2 or tokens == 1 or (tokens <= 8 and whole)


def check_gather(record: QuantizedLinear) -> None:
    indices = np.array([[0, 28, 13], [5, 7, 28]])
    got = emulated.gather(numpy_inputs(record, contract.GATHER), emit.attributes(record.spec()), indices)
    # Both sides work in fp32; they differ in the order of a sum over planes.
    np.testing.assert_allclose(got, expected(record, indices, contract.GATHER), rtol=0, atol=2e-6)


def cases(bits: int) -> Iterator[Case]:
    """Yield the name of each case of a width and the check to run."""
    sizes: dict[str, Any] = {"out_features": 29, "in_features": COLUMNS, "bits": bits}
    for planes, group, rank in product(PLANES, GROUPS, (0, 2)):
        record = case_record("plain", **sizes, planes=planes, group=group, rank=rank, bias=True)
        name = f"{bits} bits, planes {planes}, group {group}, branch {rank}"
        if not rank:
            yield f"gather, {name}", partial(check_gather, record)
        for dtype, tokens in product(test_cuda_emulated.TORCH, TOKENS):
            here = f"{name}, {dtype}, {tokens} tokens"
            yield f"matmul, {here}", partial(test_cuda_emulated.check_matmul, record, dtype, tokens)
            rounded = not has_integer_kernel(record, tokens)
            yield f"A8, {here}", partial(test_cuda_int8.check, record, dtype, tokens, rounded_weights=rounded)


@pytest.mark.slow
@pytest.mark.parametrize("bits", layout.BITS)
def test_the_full_product(bits: int) -> None:
    wrong, count = [], 0
    for name, check in cases(bits):
        count += 1
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{name}: {str(error).strip().splitlines()[0]}")
    assert count == len(PLANES) * len(GROUPS) * (1 + 2 * 2 * len(test_cuda_emulated.TORCH) * len(TOKENS))
    assert not wrong, f"{len(wrong)} of {count} cases: " + "; ".join(wrong[:8])
