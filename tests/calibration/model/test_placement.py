"""Modules on another device or in another type for a while: what was changed meanwhile stays changed."""

from __future__ import annotations

import torch
from torch import nn

from rankbook.calibration.model.placement import in_float32


def test_new_values_of_a_parameter_are_kept_wherever_they_come_to_lie() -> None:
    # An allocator hands out the address of freed values again. Compared by address alone, a parameter whose new values
    # came to lie where its first ones had been seemed unchanged: scaled norms were lost.
    norm = nn.LayerNorm(64, dtype=torch.bfloat16)
    with in_float32(norm):
        first = norm.weight.data_ptr()
        norm.weight.data = torch.zeros(64)
        others = [torch.full((64,), 3.0) for _ in range(1000)]
        norm.weight.data = next((one for one in others if one.data_ptr() == first), others[0])
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.tolist() == [3.0] * 64


def test_unchanged_parameters_are_the_same_objects_with_the_same_bits() -> None:
    layer = nn.Linear(3, 5, dtype=torch.float16)
    weight, values = layer.weight, layer.weight.detach().clone()
    with in_float32(layer):
        assert layer.weight.dtype == torch.float32
    assert layer.weight is weight
    assert torch.equal(layer.weight, values)
