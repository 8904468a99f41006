"""What methods are given: damaged layers are named, and sequences are on the device of the block in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rankbook.calibration.fitting.problem import BlockProblem
from tests.calibration import problems


def test_layers_that_cannot_be_computed_with_are_named() -> None:
    layer = problems.layer(8, 32)
    layer.check()
    with pytest.raises(ValueError, match="the weights of layer hold NaN or infinity"):
        replace(layer, weight=torch.full((8, 32), torch.nan)).check()
    layer.statistics.gram[0, 0] = torch.inf
    with pytest.raises(ValueError, match="input statistics of layer hold NaN or infinity"):
        layer.check()


def test_sequences_are_those_of_the_index_in_float32() -> None:
    values = torch.arange(24.0).view(4, 2, 3)
    layers = {"layer": problems.layer(8, 32)}
    block = BlockProblem(nn.Identity(), layers, values.bfloat16(), values + 1, lambda module, x: module(x))
    given, wanted = block.sequences(torch.tensor([3, 1]))
    assert given.dtype == wanted.dtype == torch.float32
    assert torch.equal(given, values[[3, 1]])
    assert torch.equal(wanted, values[[3, 1]] + 1)
