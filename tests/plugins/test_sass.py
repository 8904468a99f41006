"""What the compiler made of the kernels: instructions per weight, vector loads, tensor-core products."""

from __future__ import annotations

import os
import re
from functools import cache

import pytest

from rankbook.plugins import library
from rankbook.tools.dev import roofline, sass
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
# The same for rounded activations, by (bits, planes, tokens).
BUDGET_INT8 = {
    (2, 1, 1): {64: 1.7, 128: 1.4},
    (2, 2, 1): {64: 2.3, 128: 1.8},
    (2, 2, 8): {64: 3.3, 128: 2.3},
    (3, 1, 1): {64: 1.8, 128: 2.1},
    (3, 2, 1): {64: 2.4, 128: 3.0},
    (3, 2, 8): {64: 4.4, 128: 2.8},
    (4, 1, 1): {64: 2.8, 128: 2.3},
    (4, 2, 1): {64: 3.3, 128: 2.7},
    (4, 2, 8): {64: 4.7, 128: 3.7},
}
ARCHITECTURES = (80, 90, 120)


@cache
def code(architecture: int) -> dict[str, list[sass.Instruction]]:
    found = sass.functions(library.library("trt"), architecture, "(decode|prefill)_mma.*4HalfE|decode_int8")
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


def int8_cost(architecture: int, bits: int, planes: int, tokens: int, group: int) -> sass.TurnCost:
    _, parts = roofline.int8_kernel(bits, group, tokens)
    pattern = rf"decode_int8ILi{bits}ELi{planes}ELi{tokens}ELi{parts}E"
    found = next(c for n, c in code(architecture).items() if re.search(pattern, n))
    return sass.turn_loop(found, roofline.step_columns(bits))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "planes", "tokens"), list(BUDGET_INT8))
def test_rounded_activations_stay_in_the_budget(bits, planes, tokens, architecture):
    for group, budget in BUDGET_INT8[bits, planes, tokens].items():
        cost = int8_cost(architecture, bits, planes, tokens, group)
        assert cost.per_weight(max(1, group // roofline.step_columns(bits)))["total"] <= budget


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "planes", "tokens"), [(2, 2, 1), (3, 1, 8), (4, 1, 1), (4, 2, 1), (4, 2, 8)])
def test_rounded_activations_go_to_integer_tensor_cores(bits, planes, tokens, architecture):
    cost = int8_cost(architecture, bits, planes, tokens, 128)
    assert cost.count("IMMA.16832") * 16 == cost.weights * planes
    codes = [i for i in cost.step if i.opcode.startswith("LDG") and ".128" in i.opcode and "LTC128B" in i.opcode]
    assert len(codes) * 16 == cost.weights * bits // 8  # each code is read once, 16 bytes at a time
    # Levels are in registers, or with 4 bits and two planes in a table: a look-up for two codes. The other reads of
    # shared memory bring parameters from lane to lane, 16 bytes at a time.
    assert cost.count("LDS") - cost.count("LDS.128") == (cost.weights // 2 if (bits, planes) == (4, 2) else 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("bits", "planes"), list(BUDGET))
def test_many_tokens_wait_for_tensor_cores_only(bits, planes, architecture):
    """A step is 64 tokens times four rows of a chunk per lane; copies run ahead; weights stay in registers."""
    found = code(architecture)
    name = next(name for name in found if re.search(rf"prefill_mmaILi{bits}ELi{planes}ENS0_4HalfE", name))
    cost = sass.main_loop(found[name], 64)
    columns = roofline.step_columns(bits)
    assert cost.count("HMMA.16816") == columns // 4 // 16 * 2 * 2 * 8 * 2
    assert cost.count("LDGSTS") == 64 * columns * 2 // 16 // 256  # of 16 bytes; 256 threads
    assert cost.count("STS") == 0
    assert cost.count("LDS.128") == cost.count("HMMA.16816") // 4  # of activations, each used four times


def test_many_tokens_are_bound_by_tensor_cores_on_paper():
    _, prefills = roofline.predict(library.library("trt"))
    assert {(item.bits, item.planes) for item in prefills} == set(BUDGET)
    for item in prefills:
        assert item.fraction >= 0.7, (item.gpu, item.bits, item.planes, item.group, item.limiter)


MORE_BANDWIDTH = {"GH200-96GB": 0.75, "H200-SXM": 0.6}
"""Least share of the bandwidth; H100 as in the test."""


def test_decoding_is_bound_by_memory_on_paper():
    """Up to 8 tokens, one and two planes, in at least one form. A prediction that no GPU has confirmed.

    The memory of an H100 is fast for its number of multiprocessors: with groups of 64 and more than one token, two
    planes of 2 or 3 bits keep it waiting a little. GH200 and H200 have more bandwidth for the same multiprocessors.
    """
    decodes, _ = roofline.predict(library.library("trt"))
    assert {item.activations for item in decodes} == {"fp16", "int8"}
    best: dict[tuple[str, int, int, int, int], float] = {}
    for item in (item for item in decodes if item.tokens <= 8):
        key = item.gpu, item.bits, item.planes, item.group, item.tokens
        best[key] = max(best.get(key, 0.0), item.bandwidth_fraction)
    for (gpu, bits, planes, group, tokens), fraction in best.items():
        tight = gpu == "H100-SXM" and bits < 4 and planes == 2 and group == 64 and tokens > 1
        least = MORE_BANDWIDTH.get(gpu, 0.85 if tight else 1.0)
        assert fraction >= least, (gpu, bits, planes, group, tokens)
