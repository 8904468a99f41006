"""Times of layers on paper: shares of work, and no step at 17 tokens. Arithmetic; no GPU takes part."""

from __future__ import annotations

import pytest

from rankbook.tools.dev import layer_time
from rankbook.tools.dev.layer_time import Layer


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
    ("steps", "tiles", "slots", "most", "tokens", "split"),
    [
        (64, 16, 132, 32, 17, (8, 128, 8, 1, 128)),  # 4,096 rows and 17 tokens on an H100
        (64, 4, 170, 32, 17, (2, 128, 32, 1, 128)),  # 1,024 rows on an RTX 5090: not 32 blocks
        (64, 4, 132, 32, 64, (3, 88, 22, 1, 88)),  # more tokens, more to add up
        (64, 128, 132, 4, 512, (64, 128, 1, 1, 0)),  # 512 tokens: full without sharing
        (128, 112, 132, 4, 64, (109, 132, 3, 2, 244)),  # 28,672 rows: every multiprocessor has as much as every other
        (40, 4, 3, 8, 64, (54, 3, 2, 3, 6)),
        (64, 300, 132, 1, 64, (64, 300, 1, 1, 0)),  # sums of so many tiles have no room
    ],
)
def test_tiles_are_cut_evenly_where_they_leave_places_empty(
    steps: int, tiles: int, slots: int, most: int, tokens: int, split: tuple[int, ...]
) -> None:
    assert layer_time.Split.best(steps, tiles, slots, most, tokens) == layer_time.Split(*split)


def test_bytes_of_a_layer() -> None:
    layer = Layer(4096, 4096, bits=4, planes=1, group=64, branch_rank=32)
    codes, params, factors, activations = 4096 * 4096 // 2, 4096 * 64 * 2, 8192 * 32, 8192 * 2
    assert layer.memory(1) == codes + params + factors + activations
