"""The numpy reference computes what the record means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankbook.exporter import emit
from rankbook.plugins import contract
from tests.op_cases import CASES, activations, case_record, expected, relative_error


@pytest.mark.parametrize("case", CASES)
def test_matmul_equals_the_record(case):
    record = case_record(case)
    x = activations(record)
    weight = record.weight(with_low_rank=True).double()
    want = torch.from_numpy(x).double() @ weight.T + (0 if record.bias is None else record.bias.double())
    # Products are in float64, weights in float32: what is left is the rounding of tables and of the result.
    assert relative_error(expected(record, x), want.numpy()) < 1e-6


@pytest.mark.parametrize("case", [name for name in CASES if "rank" not in CASES[name]])
def test_gather_equals_rows_of_the_record(case):
    record = case_record(case)
    ids = activations(record, contract.GATHER)
    want = record.weight().numpy()[ids]
    assert relative_error(expected(record, ids, contract.GATHER), want) < 1e-6


def test_a_triple_loop_gives_the_same_weight():
    record = case_record("plain", out_features=3)
    tables = record.codebooks().numpy()
    want = np.empty((3, record.in_features), np.float32)
    for n in range(3):
        for k in range(record.in_features):
            want[n, k] = tables[n, k // record.group, int(record.codes[n, k])]
    ids = np.arange(3)
    assert relative_error(expected(record, ids, contract.GATHER), want) < 1e-6


def test_attributes_follow_the_contract():
    record = case_record("plain")
    assert set(emit.attributes(record.spec())) == {a.name for a in contract.OPERATORS["CodebookMatMul3"].attributes}
