"""Only the rotary embedding of Llama becomes one node, with the same result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rankbook.exporter.passes.rotary import FuseRotary
from tests.exporter.passes.graphs import run

HEADS, SIZE = 4, 16


class Rotary(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        both = torch.cat([angles, 2 * angles if self.change == "angles" else angles], -1)
        cos, sin = both.cos().to(x.dtype).unsqueeze(1), both.sin().to(x.dtype).unsqueeze(1)
        first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
        turned = torch.cat([second, first] if self.change == "sign" else [-second, first], -1)
        return x * cos + turned * sin


@pytest.mark.parametrize("change", ["", "sign", "angles"])
def test_only_the_rotary_embedding_of_llama_is_fused(change):
    x, angles = torch.randn(2, HEADS, 3, SIZE).half(), torch.randn(2, 3, SIZE // 2)
    program = torch.onnx.export(Rotary(change).eval(), (x, angles), dynamo=True, opset_version=23, verbose=False)
    assert program is not None
    model = program.model
    feeds = {value.name or "": tensor.numpy() for value, tensor in zip(model.graph.inputs, (x, angles), strict=True)}
    want = run(model, feeds)
    FuseRotary()(model)
    assert ("RotaryEmbedding" in {node.op_type for node in model.graph}) == (change == "")
    # Half precision: two products and a sum of numbers up to 4.
    assert np.abs(run(model, feeds).astype(np.float32) - want.astype(np.float32)).max() < 1e-2
