"""Every combination of operator, bits, planes, group, type and number of tokens, over the emulation.

The other tests of the CUDA kernels let these take turns and vary what is fixed here: one panel of 29 rows of 256
inputs, int8 parameters with an offset, int8 levels, a bias, error branches of rank 2 in int8. Numbers of tokens are one
of each form of a kernel: a single one, up to 8, up to 16 and more. Bounds are those of the other tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from rankbook.plugins import layout
from tests.calibration.records import random_record
from tests.ops.cases import DTYPES, Op, random_x
from tests.ops.runners import RUNNERS, check
from tests.plugins import emulated

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler to build the emulated kernels")

COLUMNS = 256
PLANES = (1, 2, 3, 4)
GROUPS = (16, 32, 64, 128, 256)
TOKENS = (1, 5, 13, 17)


def cases(bits: int) -> Iterator[tuple[str, Op]]:
    """Yield the name of each case of a width and its operator."""
    sizes: dict[str, Any] = {"out_features": 29, "in_features": COLUMNS, "bits": bits}
    for planes, group, rank in product(PLANES, GROUPS, (0, 2)):
        record = random_record(**sizes, planes=planes, group=group, rank=rank, bias=True)
        name = f"{bits} bits, planes {planes}, group {group}, branch {rank}"
        if not rank:
            yield f"gather, {name}", Op.of(record, np.array([[0, 28, 13], [5, 7, 28]]), gather=True)
        for dtype, tokens in product(DTYPES, TOKENS):
            x = random_x(record, dtype, (tokens,), seed=tokens)
            for int8 in (False, True):
                yield (
                    f"{'A8' if int8 else 'matmul'}, {name}, {dtype}, {tokens} tokens",
                    Op.of(record, x, int8_activations=int8),
                )


@pytest.mark.slow
@pytest.mark.parametrize("bits", layout.BITS)
def test_the_full_product(bits: int) -> None:
    wrong, count = [], 0
    for name, op in cases(bits):
        count += 1
        try:
            check(RUNNERS["cuda"], op)
        except (AssertionError, RuntimeError) as error:
            wrong.append(f"{name}: {str(error).strip().splitlines()[0]}")
    assert count == len(PLANES) * len(GROUPS) * (1 + 2 * 2 * len(DTYPES) * len(TOKENS))
    assert not wrong, f"{len(wrong)} of {count} cases: " + "; ".join(wrong[:8])
