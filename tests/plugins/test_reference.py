"""The numpy reference computes what the record means."""

from __future__ import annotations

import numpy as np
import pytest

from rankbook.plugins import contract
from tests.calibration.records import random_record
from tests.ops.cases import FORMS, Op, random_x, relative_error


@pytest.mark.parametrize("case", FORMS)
def test_matmul_equals_the_record(case):
    op = FORMS[case].draw()
    weight = op.record.weight(with_low_rank=True).numpy().astype(np.float64)
    bias = 0 if op.record.bias is None else op.record.bias.numpy().astype(np.float64)
    # Products are in float64, weights in float32: what is left is the rounding of codebooks and of the result.
    assert relative_error(op.expected(), op.x.astype(np.float64) @ weight.T + bias) < 1e-6


@pytest.mark.parametrize("case", [name for name in FORMS if not FORMS[name].rank])
def test_gather_equals_rows_of_the_record(case):
    record = FORMS[case].draw().record
    rows = np.random.default_rng(0).integers(0, record.out_features, (2, 3))
    assert relative_error(Op.of(record, rows, gather=True).expected(), record.weight().numpy()[rows]) < 1e-6


def test_a_triple_loop_gives_the_same_weight():
    record = random_record(out_features=3)
    codebooks = record.codebooks().numpy()
    want = np.empty((3, record.in_features), np.float32)
    for n in range(3):
        for k in range(record.in_features):
            want[n, k] = codebooks[n, k // record.group, int(record.codes[n, k])]
    assert relative_error(Op.of(record, np.arange(3), gather=True).expected(), want) < 1e-6


def test_attributes_follow_the_contract():
    record = random_record()
    names = {attribute.name for attribute in contract.PACKED["CodebookMatMul3"].attributes}
    assert set(Op.of(record, random_x(record)).attributes) == names
