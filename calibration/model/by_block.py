"""Running a whole model whose weights stay in their files: one block in float32 at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankbook.calibration.memory import relieve
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.capture import each_placed, outside_in_float32
from rankbook.calibration.model.packed_modules import PackedModule

_ROWS_AT_ONCE = 4096
"""Rows of an output layer that are in float32 at a time."""


@contextlib.contextmanager
def by_block(model: Any, device: torch.device) -> Iterator[None]:
    """Let a model compute in float32, as if all of it were, with one block of it in float32 at a time.

    Args:
        model: As it was loaded, in its own dtype, on the CPU; packed layers are decoded in each call.
        device: Where the blocks compute.
    """
    blocks, head = adapter_of(model).blocks(), adapter_of(model).embeddings().head
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    dtypes = [module.compute_dtype for module in packed]
    with contextlib.ExitStack() as held:
        held.enter_context(outside_in_float32(model, blocks))
        held.enter_context(each_placed(blocks, device, torch.float32))
        if head is not None and type(head[1]) is nn.Linear:
            held.enter_context(_some_rows_at_a_time(head[1]))
        try:
            for module in packed:
                module.compute_dtype = torch.float32
            yield
        finally:
            for module, dtype in zip(packed, dtypes, strict=True):
                module.compute_dtype = dtype


@contextlib.contextmanager
def _some_rows_at_a_time(head: nn.Linear) -> Iterator[None]:
    """Widen an output layer row by row."""

    def forward(x: Tensor) -> Tensor:
        weights = torch.split(head.weight, _ROWS_AT_ONCE)
        y = torch.cat([functional.linear(x.float(), rows.float()) for rows in weights], -1)
        relieve()
        return y if head.bias is None else y + head.bias.float()

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        del head.__dict__["forward"]
