"""Recurrences in standard operators give what the functions of transformers give, for texts of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from transformers.models.bamba import modeling_bamba as mamba2
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from rankbook.exporter import recurrence
from rankbook.exporter.passes.recurrence import CHUNK, LowerRecurrence
from rankbook.exporter.passes.shapes import InferShapes

# float32 sums in another order; 1e-6 is typical.
TOLERANCE = 2e-5
LENGTHS = (1, 5, CHUNK, CHUNK + 1, 2 * CHUNK + 22)
BATCH, HEADS, KEYS, VALUES = 2, 4, 8, 16


class _Layer(nn.Module):
    """A function of transformers on plain tensors."""

    def __init__(self, of: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.of, self.function = of, function

    def forward(self, inputs: list[Tensor], state: Tensor) -> Any:
        """Return what it returns: the result and the new state."""
        if self.of == "mamba2":
            x, dt, a, b, c, skip, bias = inputs
            more = {"D": skip, "dt_bias": bias, "dt_softplus": True, "return_final_states": True, "chunk_size": 16}
            return self.function(x, dt, a, b, c, initial_states=state, **more)
        more = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        return self.function(*inputs[:3], g=inputs[3], beta=inputs[4], **more)


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "qwen3_next": (qwen.torch_chunk_gated_delta_rule, functools.partial(recurrence._delta_rule, real=None)),
    "kimi_linear": (kimi.chunk_kimi_delta_attention, functools.partial(recurrence._delta_rule, real=None)),
    "mamba2": (mamba2.mamba2_chunk_scan, functools.partial(recurrence._chunk_scan, real=None)),
}


def inputs_of(kind: str, length: int) -> tuple[list[Tensor], Tensor]:
    """Return inputs in the order of a function, and a state: keys that are alike, as those of a repeated word."""
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    groups = HEADS // 2 if kind != "kimi_linear" else HEADS
    keys = draw(BATCH, 1, groups, KEYS) + 0.1 * draw(BATCH, length, groups, KEYS)
    queries, values = draw(BATCH, length, groups, KEYS), draw(BATCH, length, HEADS, VALUES)
    if kind == "mamba2":
        per_head = [-draw(HEADS).exp(), keys, queries, draw(HEADS), draw(HEADS)]
        return [values, draw(BATCH, length, HEADS), *per_head], draw(BATCH, HEADS, VALUES, KEYS)
    decays = draw(BATCH, length, HEADS, KEYS) if kind == "kimi_linear" else draw(BATCH, length, HEADS)
    beta = draw(BATCH, length, HEADS).sigmoid()
    return [queries, keys, values, -0.1 * decays.exp(), beta], draw(BATCH, HEADS, KEYS, VALUES)


@pytest.mark.parametrize("kind", KINDS)
def test_any_length_in_one_graph(kind: str) -> None:
    original, traced = KINDS[kind]
    inputs, state = inputs_of(kind, 3)
    axes = [{0: "batch", 1: "sequence"} if item.ndim > 2 else {} for item in inputs]
    program = torch.onnx.export(
        _Layer(kind, traced), (inputs, state), dynamo=True, dynamic_shapes=(axes, {0: "batch"}), verbose=False
    )
    assert program is not None
    model = program.model
    LowerRecurrence()(model)
    InferShapes()(model)
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for length in LENGTHS:
        inputs, state = inputs_of(kind, length)
        want = [item.numpy() for item in _Layer(kind, original)(inputs, state)]
        feeds = dict(zip(names, (item.numpy() for item in (*inputs, state)), strict=True))
        results = [session.run(None, feeds)]
        if length == LENGTHS[1]:
            results.append(ReferenceEvaluator(proto).run(None, feeds))
        for got in results:
            for a, b in zip(got, want, strict=True):
                assert a.shape == b.shape
                assert np.abs(a - b).max() < TOLERANCE * np.abs(b).max(), length
