"""The block that is timed is what its operators say, and the peer takes its shape."""

from __future__ import annotations

import numpy as np
import pytest

from rankbook.tools.dev import mixture_time
from rankbook.tools.dev.mixture_time import Shape
from tests.ops.runners import built

SMALL = Shape(hidden=128, inner=64, experts=8, chosen=2)


def test_every_expert_is_chosen_once() -> None:
    chosen = np.concatenate(SMALL.choices(np.random.default_rng(0)))
    assert sorted(chosen) == list(range(8))


@pytest.mark.parametrize("planes", [1, 2])
def test_the_bytes_of_an_expert_are_its_share_of_the_constants(planes: int) -> None:
    model, size = mixture_time.packed(SMALL, planes)
    held = sum(len(tensor.raw_data) for tensor in model.graph.initializer if "_" in tensor.name)
    assert size == held / SMALL.experts


@built
def test_every_kind_of_block_is_timed() -> None:
    results = mixture_time.measure(SMALL, 1, 2)
    assert [result.name.split()[0] for result in results] == ["rankbook"] * 3 + ["QMoE"]
    assert all(result.microseconds > 0 and result.share > 0 for result in results)
