"""The arithmetic of a cluster: shapes are those of the models, and what limits a run is what should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankbook.tools.dev import cluster_cost
from rankbook.tools.dev.cluster_cost import SHAPES, Block, Costs, Matrices, blocks_apart, layers_apart, work

FAST = Costs(task=0.0, start=0.0, put=1e20, get=1e20, back=1e20, network=1e20, half=1e12, single=1e12)
SMALL = Block(3, 10, (Matrices(2, 20, 10), Matrices(1, 10, 20)))


def test_the_shapes_have_the_weights_of_their_models() -> None:
    found = {name: sum(block.count * block.weights for block in model) for name, model in SHAPES.items()}
    assert found["70B"] == pytest.approx(68.5e9, rel=0.01)  # 70.6 with its embeddings
    assert found["400B mixture"] == pytest.approx(398.6e9, rel=0.01)


def test_a_block_is_counted_by_hand() -> None:
    found, tokens = work(SMALL, FAST), cluster_cost.TOKENS
    assert found.pass_ == pytest.approx(2 * 600 * tokens / 1e12)
    assert found.gram == pytest.approx(2 * (100 + 400) * tokens / 1e12)
    assert found.closed == pytest.approx((2 * (1000 + 4 * 20 * 100) + 8000 + 4 * 10 * 400) / 1e12)
    assert found.largest == pytest.approx((8000 + 4 * 10 * 400) / 1e12)
    assert found.training == pytest.approx(6 * 600 * cluster_cost.BATCH * cluster_cost.STEPS / 1e12)
    assert (found.layers, found.weight_bytes, found.gram_bytes) == (3, 1200, 2000)


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    alone, dense = Block(1, 10, (Matrices(4, 20, 10, 4, 0.25),)), Block(1, 10, (Matrices(1, 20, 10),))
    assert work(alone, FAST).pass_ == pytest.approx(work(dense, FAST).pass_)
    assert work(alone, FAST).gram == pytest.approx(work(dense, FAST).gram)
    assert work(alone, FAST).closed == pytest.approx(4 * work(dense, FAST).closed)


@pytest.mark.parametrize("trains", [False, True])
def test_more_gpus_help_until_blocks_or_the_starting_process_limit(trains: bool) -> None:
    one, model = work(SMALL, FAST), [SMALL]
    many = blocks_apart(model, FAST, 1000, trains=trains)
    assert many == pytest.approx(4 * one.pass_ + one.gram + one.closed + trains * one.training), "one block in full"
    assert blocks_apart(model, FAST, 1, trains=trains) > 1.5 * many
    assert layers_apart(model, FAST, 1000, trains=trains) >= 3 * (one.pass_ + trains * one.training)
    assert blocks_apart(model, replace(FAST, network=1.0), 1000, trains=trains) > 3 * one.weight_bytes
    assert blocks_apart(model, replace(FAST, put=1.0), 1000, trains=trains, files=True) < 4 * one.stream_bytes
    assert layers_apart(model, replace(FAST, start=1.0), 1000, trains=trains) > 9.0


def test_the_table_has_a_row_for_each_shape_and_way() -> None:
    lines = cluster_cost.table(FAST).splitlines()
    assert len(lines) == 2 + 6 * len(SHAPES)
    assert all(line.count("|") == 2 + len(cluster_cost.GPUS) for line in lines)
