"""Times of layers on paper: shares of work, and no step at 17 tokens. Arithmetic; no GPU takes part."""

from __future__ import annotations

import pytest

from rankbook.plugins import library
from rankbook.tools.dev import layer_time, sass
from rankbook.tools.dev.layer_time import Layer
from rankbook.tools.errors import CommandError


@pytest.mark.parametrize(
    ("panels", "steps", "slots", "taken", "shares"),
    [
        (344, 64, 264, 0, 2),  # 11,008 rows: 3 waves of 4 steps beat 2 of 8
        (4, 1, 264, 0, 1),  # nothing to share
        (128, 64, 264, 8, 2),  # 4,096 rows: 8 blocks of the branch have room beside 256
        (128, 128, 264, 9, 4),  # and 9 do not: two waves of quarters beat one of wholes
    ],
)
def test_shares_fill_waves(panels: int, steps: int, slots: int, taken: int, shares: int) -> None:
    assert layer_time.panel_shares(panels, steps, slots, taken) == shares


@pytest.mark.parametrize(
    ("steps", "tiles", "slots", "most", "split"),
    [
        (64, 16, 132, 8, (8, 128, 8, 1, 128)),  # 4,096 rows and 17 tokens on an H100
        (64, 128, 132, 4, (64, 128, 1, 1, 0)),  # 512 tokens: full without sharing
        (128, 112, 132, 4, (109, 132, 3, 2, 244)),  # 28,672 rows: every multiprocessor has as much as every other
        (40, 4, 3, 8, (54, 3, 2, 3, 6)),
        (64, 300, 132, 1, (64, 300, 1, 1, 0)),  # sums of so many tiles have no room
    ],
)
def test_tiles_are_cut_evenly_where_they_leave_places_empty(
    steps: int, tiles: int, slots: int, most: int, split: tuple[int, ...]
) -> None:
    assert layer_time.Split.best(steps, tiles, slots, most) == layer_time.Split(*split)


def test_bytes_of_a_layer() -> None:
    layer = Layer(4096, 4096, bits=4, planes=1, group=64, branch_rank=32)
    codes, params, factors, activations = 4096 * 4096 // 2, 4096 * 64 * 2, 8192 * 32, 8192 * 2
    assert layer.memory(1) == codes + params + factors + activations


@pytest.fixture(scope="module")
def times() -> list[layer_time.Times]:
    if reason := library.unavailable("trt"):
        pytest.skip(reason)
    try:
        sass.tool("cuobjdump")
    except CommandError as error:
        pytest.skip(str(error))
    return layer_time.times(library.library("trt"))


def test_seventeen_tokens_cost_little_more_than_sixteen(times: list[layer_time.Times]) -> None:
    assert times
    for each in times:
        for layer in layer_time.LAYERS:
            few, more = each.of(layer, 16), each.of(layer, 17)
            # The smallest layer has few tiles to share: 5.07 on the widest GPU, where up to 16 tokens the product runs
            # beside its branch and from 17 on there is no room for both; 1.8 on an H100, where there is.
            assert more.busy <= (5.1 if layer.rows == 1024 else 2.0) * few.busy, (each.gpu.name, layer)


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
            beside = min(one.branch, one.product) if early else 0.0
            # From 17 tokens on registers decide whether blocks of both kernels fit; on an H100 they do.
            assert one.hidden == beside or (one.hidden == 0.0 and tokens > 16 and each.gpu.name != "H100-SXM")


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
