"""What the compiler made of the kernels: instructions per weight, vector loads, tensor-core products.

And what follows from it on paper: rooflines, times of layers, no step at 17 tokens. No GPU takes part. Everything that
reads the machine code of the built library is in this file, since reading it takes a minute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rankbook.plugins import library
from rankbook.tools.dev import layer_time, roofline, sass
from rankbook.tools.dev.layer_time import Layer
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


def cost_of(architecture: int, key: roofline.Key) -> sass.LoopCost:
    found = roofline.costs(library.library("trt"), architecture)
    if not found and not EXPECTED:
        pytest.skip(f"the library was built without sm_{architecture}")
    return found[key]


def decode_cost(architecture: int, bits: int, planes: int, tiles: int = 1) -> sass.LoopCost:
    return cost_of(architecture, ("fp16", bits, planes, 8 * tiles, 0))


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


def int8_cost(architecture: int, bits: int, planes: int, tokens: int, group: int) -> sass.LoopCost:
    _, parts = roofline.int8_kernel(bits, group, tokens)
    return cost_of(architecture, ("int8", bits, planes, tokens, parts))


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
    cost = cost_of(architecture, ("prefill", bits, planes, 64, 0))
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


@pytest.fixture(scope="module")
def times() -> list[layer_time.Times]:
    return layer_time.times(library.library("trt"))


def test_seventeen_tokens_cost_little_more_than_sixteen(times: list[layer_time.Times]) -> None:
    assert times
    for each in times:
        for layer in layer_time.LAYERS:
            few, more = each.of(layer, 16), each.of(layer, 17)
            assert more.busy <= 2.0 * few.busy, (each.gpu.name, layer)


def test_blocks_that_share_columns_help_where_tiles_are_few(times: list[layer_time.Times]) -> None:
    for each in times:
        for tokens in (17, 32, 64, 128, 256):
            for layer in layer_time.LAYERS:
                assert each.of(layer, tokens).busy <= 1.1 * each.of(layer, tokens, share=False).busy
        if each.gpu.multiprocessors > 100:
            layer = Layer(4096, 4096)
            assert each.of(layer, 17).busy < 0.4 * each.of(layer, 17, share=False).busy
            assert each.of(layer, 17).shares >= 6


def test_layers_that_fill_a_gpu_wait_for_memory(times: list[layer_time.Times]) -> None:
    """Up to 16 tokens with a branch of rank 32; small layers are ruled by latencies, which this counts as well.

    GH200 and H200 have more bandwidth than fp16 activations can use: int8 ones are for them.
    """
    for each in (each for each in times if each.gpu.name not in ("GH200-96GB", "H200-SXM")):
        for tokens in (1, 8, 16):
            assert each.of(Layer(28672, 8192), tokens).ratio <= 1.3, (each.gpu.name, tokens)
            if each.gpu.code >= layer_time.EARLY:
                assert each.of(Layer(4096, 4096), tokens).ratio <= 1.4, (each.gpu.name, tokens)


def test_behind_the_first_kernel_others_start_early_where_the_gpu_can(times: list[layer_time.Times]) -> None:
    for each in times:
        for tokens in (1, 8, 17, 64, 256):
            one = each.of(Layer(4096, 4096), tokens)
            early = each.gpu.code >= layer_time.EARLY
            assert one.in_turn == (1 if early else one.launches)
            assert one.hidden == (min(one.branch, one.product) if early else 0.0), (each.gpu.name, tokens)
        # Beside one block of many tokens, room for one of x down^T with 48 registers; 3 bits would spill.
        forms = {key: count for key, count in each.registers.items() if key[0] == "prefill" and key[1] != 3}
        assert not early or all(count <= 208 for count in forms.values()), each.gpu.name


def test_many_tokens_keep_tensor_cores_busy_on_an_h100(times: list[layer_time.Times]) -> None:
    """A branch of rank 32 among it: at least 70 % of the rate of mma.sync from 256 tokens on."""
    for each in (each for each in times if each.gpu.name == "H100-SXM"):
        gpu = each.gpu
        rate = 16 * 8 * 16 / gpu.mma * gpu.multiprocessors * gpu.clock * 1e3  # multiply-adds per microsecond
        for layer in (layer for layer in layer_time.LAYERS if layer.rows >= 4096):
            for tokens in (256, 512, 1024, 4096):
                best = layer.rows * layer.columns * tokens / rate
                assert best / each.of(layer, tokens).busy >= 0.7, (layer, tokens)


def test_experts_of_a_token_cost_what_their_codes_cost(times: list[layer_time.Times]) -> None:
    """Two matrices of 8 experts are as many codes as one of 16; what is not chosen costs nothing."""
    for each in times:
        layer, chosen = layer_time.EXPERTS[2]
        few, many = each.of_experts(layer, chosen), each.of_experts(layer, 2 * chosen)
        assert many.memory == 2 * few.memory
        assert 1.5 * few.busy < many.busy < 2.1 * few.busy, each.gpu.name
        assert few.ratio <= (1.3 if each.gpu.name not in ("GH200-96GB", "H200-SXM") else 2.0), each.gpu.name


def test_every_gpu_has_a_column(times: list[layer_time.Times]) -> None:
    text = layer_time.tables(library.library("trt"))
    assert all(each.gpu.name in text for each in times)
    assert text.count("| 17 |") == len(layer_time.LAYERS)


def test_the_built_library_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--json", str(tmp_path / "roofline.json")]) == 0
    out = capsys.readouterr().out
    assert "Predicted, not measured" in out
    assert "| 3, 2, 64 |" in out
    content = json.loads((tmp_path / "roofline.json").read_text())
    assert {item["tokens"] for item in content["decode"]} == set(roofline.TOKENS)
