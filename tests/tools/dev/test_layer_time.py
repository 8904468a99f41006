"""Times of layers on paper: shares of work, and no step at 17 tokens. Arithmetic; no GPU takes part."""

from __future__ import annotations

import pytest

from rankbook.plugins import library
from rankbook.tools.dev import layer_time, sass
from rankbook.tools.dev.layer_time import Layer
from rankbook.tools.errors import CommandError


@pytest.mark.parametrize(
    ("blocks", "steps", "most", "slots", "prologue", "toll", "shares"),
    [
        (16, 64, 8, 132, 2, 6, 8),  # 4,096 rows and 17 tokens on an H100: one wave of 128 blocks
        (128, 64, 1, 132, 2, 6, 1),  # 512 tokens: full without sharing
        (344, 8, 2, 264, 2, 0, 2),  # 11,008 rows, decoding: 3 waves of 4 steps beat 2 of 8
        (4, 1, 8, 264, 2, 6, 1),  # nothing to share
    ],
)
def test_shares_fill_waves(
    blocks: int, steps: int, most: int, slots: int, prologue: int, toll: int, shares: int
) -> None:
    assert layer_time.best_shares(blocks, steps, most, slots, prologue, toll) == shares


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
            # The smallest layer has few tiles to share (2.35 on the widest GPU; 12.8 where columns are not shared).
            assert more.busy <= (2.4 if layer.rows == 1024 else 2.0) * few.busy, (each.gpu.name, layer)


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
