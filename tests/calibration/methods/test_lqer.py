"""The LQER method: block floating point and its branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rankbook.calibration.methods import lqer, rtn
from rankbook.calibration.methods.lqer import LqerConfig
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from tests.calibration import problems


def test_the_base_is_plain_block_floating_point() -> None:
    problem = problems.layer(40, 128)
    record = lqer.quantize(problem, LqerConfig(bits=4, error_rank=8))
    base = rtn.quantize(problem, rtn.RtnConfig(bits=4, group_size=32, format="mxint"))
    assert torch.equal(record.codes, base.codes)
    assert record.method == "lqer"
    assert record.low_rank is not None
    assert record.low_rank.branch_rank == 8


def test_branches_and_passes_lower_the_output_error() -> None:
    problem = problems.layer(96, 128)
    config = LqerConfig(bits=3, error_rank=16)

    def lost(**changes: Any) -> float:
        record = lqer.quantize(problem, dataclasses.replace(config, **changes))
        return problems.output_error(problem, record.weight(with_low_rank=True))

    assert lost(error_branch="qera") < lost() < lost(error_branch="lqer") < lost(error_branch="none")
    assert lost(passes=3) < lost()
    assert lost(format="affine") < lost()


def test_packing_keeps_the_branch() -> None:
    problem = problems.layer(40, 96)
    record = lqer.quantize(problem, LqerConfig(bits=3, error_rank=4))
    again = QuantizedLinear.unpack(record.pack(), record.spec())
    assert torch.equal(again.weight(with_low_rank=True), record.weight(with_low_rank=True))


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of none, lqer"):
        LqerConfig(error_branch="svd")
    with pytest.raises(ValueError, match="choose 8 or 16"):
        LqerConfig(factor_bits=4)
    with pytest.raises(ValueError, match="at least"):
        LqerConfig(passes=0)
