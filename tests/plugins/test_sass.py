"""What the compiler made of the kernels: instructions per weight, vector loads, tensor-core products."""

from __future__ import annotations

import os
import re
from functools import cache

import pytest

from rankbook.plugins import library
from rankbook.tools import roofline, sass
from rankbook.tools.errors import CommandError

EXPECTED = "RANKBOOK_EXPECT_CUDA" in os.environ


def _unavailable() -> str | None:
    if reason := library.unavailable("trt"):
        return reason
    try:
        sass.tool("cuobjdump")
    except CommandError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(_unavailable() is not None and not EXPECTED, reason=str(_unavailable()))

# Instructions per weight, fp16, up to 8 tokens, by (bits, planes) and group. Origin: counted in the code that nvcc 13.0
# makes for sm_80 (2026-11), plus 15 % for other versions and architectures. More means that the loop lost its shape.
BUDGET = {
    (2, 1): {64: 4.1, 128: 3.5},
    (2, 2): {64: 4.4, 128: 3.7},
    (3, 1): {64: 3.9, 128: 3.9},
    (3, 2): {64: 4.2, 128: 4.2},
    (4, 1): {64: 4.2, 128: 3.7},
    (4, 2): {64: 5.0, 128: 4.4},
}
ARCHITECTURES = (80, 90, 120)


@cache
def code(architecture: int) -> dict[str, list[sass.Instruction]]:
    found = sass.functions(library.library("trt"), architecture, "decode_mma.*4HalfE")
    if not found and not EXPECTED:
        pytest.skip(f"the library was built without sm_{architecture}")
    return found


def decode_cost(architecture: int, bits: int, planes: int, tiles: int = 1) -> sass.LoopCost:
    pattern = rf"decode_mmaILi{bits}ELi{planes}ELi{tiles}ENS0_4HalfE"
    return sass.main_loop(next(c for n, c in code(architecture).items() if re.search(pattern, n)), 8 * tiles)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "planes"), list(BUDGET))
def test_instructions_per_weight_stay_in_the_budget(bits, planes, architecture):
    cost = decode_cost(architecture, bits, planes)
    step = 128 if bits == 3 else 64
    assert cost.weights == 4 * step // 4  # four rows and a quarter of the step's columns
    for group, budget in BUDGET[bits, planes].items():
        assert cost.per_weight(max(1, group // step))["total"] <= budget


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "planes"), list(BUDGET))
def test_loads_are_vectors_and_every_product_is_a_tensor_core_one(bits, planes, architecture):
    cost = decode_cost(architecture, bits, planes)
    codes = [i for i in cost.step if i.opcode.startswith("LDG") and ".128" in i.opcode and "LTC128B" in i.opcode]
    assert len(codes) * 16 == cost.weights * bits // 8  # each code is read once, 16 bytes at a time
    assert not [i for i in cost.step if i.opcode.startswith("LDG") and ".128" not in i.opcode]
    assert cost.count("HMMA.16816") * 8 == cost.weights
    twice = decode_cost(architecture, bits, planes, tiles=2)
    assert twice.count("HMMA.16816") * 4 == twice.weights  # twice the tokens: twice the products, the same look-ups
    lookups = [i for i in cost.step if i.opcode.startswith("LDS")]
    if bits < 4:
        assert not lookups  # the codebook of a group is in registers
    else:
        assert len(lookups) == cost.weights // 2
        assert {i.opcode for i in lookups} == ({"LDS"} if planes == 1 else {"LDS.64"})


def test_decoding_is_bound_by_memory_on_paper():
    """Up to 8 tokens, one and two planes: all of 4 bits, and 2 and 3 bits but for the GPUs with HBM.

    Their memory is fast for their number of multiprocessors. A prediction that no GPU has confirmed.
    """
    decodes, _ = roofline.predict(library.library("trt"))
    assert decodes
    with_hbm = ("A100-80GB", "H100-SXM")
    for item in (item for item in decodes if item.tokens <= 8):
        least = 0.65 if item.gpu in with_hbm and item.bits < 4 else 1.0
        assert item.bandwidth_fraction >= least, (item.gpu, item.bits, item.planes, item.group, item.limiter)
