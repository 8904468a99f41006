"""Launches the kernels for rounded activations as launch.cu does: plan, workspace, grids, shared memory."""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.plugins import emulated
from tests.plugins.ptx import launches
from tests.plugins.ptx.launches import (
    KINDS,
    PANEL,
    WARPS,
    MatmulKernel,
    Module,
    arguments_of,
    ceil_div,
    share_panels,
    stored_planes,
)
from tests.plugins.ptx.memory import Array, Device

ZERO_BYTES, LEVEL_BYTES = 32, 4 * 256 + 4 * 4 + 4 * 4
TABLE_BYTES = 256 * 128


class Int8Plan(c.Structure):
    _fields_ = [(name, c.c_int) for name in ("step", "parts", "span", "piece", "turns", "padded", "slots")]


class Int8Kernel(c.Structure):
    _fields_ = [
        ("k", MatmulKernel),
        ("plan", Int8Plan),
        ("ordered", c.c_void_p),
        ("natural", c.c_void_p),
        ("rounded", c.c_void_p),
        ("levels", c.c_void_p),
        ("team", c.c_int),
    ]


class RoundProduct(c.Structure):
    _fields_ = [("weight", emulated.PackedWeight), ("levels", c.c_void_p), ("arrivals", c.c_void_p)]


class RoundKernel(c.Structure):
    _fields_ = [("x", Int8Kernel), ("count", c.c_int), ("products", RoundProduct * 4)]


def plan_of(weight: emulated.PackedWeight, tokens: int) -> Int8Plan:
    """Return how the columns are cut; ``parts`` is 0 if groups are neither whole steps nor half ones."""
    size, step = weight.columns // weight.groups, 128 if weight.bits == 3 else 64
    parts = 1 if weight.groups == 1 or size % step == 0 else 2 if size % (step // 2) == 0 else 0
    span = 2 if parts == 1 and weight.groups > 1 and step == 64 and size % 128 == 0 else 1
    turns = ceil_div(weight.columns, span * step)
    piece = step // 2 if parts == 2 else span * step
    slots = next(n for n in (1, 8, 16) if n >= tokens)
    return Int8Plan(step, parts, span, piece, turns, turns * span * step, slots)


def matmul(
    module: Module, tensors: Mapping[str, Array], attributes: Mapping[str, Any], x: Array, dtype: str, blocks: int = 1
) -> Array:
    """Run the product of x (M, K) rounded to 8 bits, as ``emulated.matmul(..., int8=True)``; up to 16 tokens.

    The other arguments are those of `launches.matmul`. Where groups have no integer kernel, x is rounded in its type.
    """
    device = Device()
    kernel = Int8Kernel(arguments_of(device, tensors, attributes, x, dtype))
    m, plan = kernel.k.m, plan_of(kernel.k.m.weight, len(x))
    kernel.team = WARPS if m.weight.columns // m.weight.groups >= 1024 else 1
    teams = ceil_div(m.weight.groups * kernel.team, WARPS)
    if plan.parts == 0:
        kernel.ordered = device.add(np.full(x.shape, -1).astype(x.dtype), writable=True)
        module.launch(f"round_in_place.*{KINDS[dtype]}E", device, bytes(kernel), (teams, m.tokens), 4 * WARPS)
        return launches.matmul(module, tensors, attributes, device.array(kernel.ordered), dtype, blocks)
    kernel.plan = plan

    def scratch(count: int) -> int:
        return device.add(np.full(count, 0xFF, np.uint8), writable=True)

    pieces = plan.padded // plan.piece
    kernel.ordered = scratch(m.tokens * plan.padded + ZERO_BYTES)
    kernel.natural = scratch(m.tokens * m.weight.columns) if m.rank else 0
    kernel.rounded, kernel.levels = scratch(8 * pieces * plan.slots), scratch(LEVEL_BYTES)
    share_panels(device, kernel.k, plan.slots, blocks, cleared=False)
    rounding = RoundKernel(kernel, 1)
    rounding.products[0] = RoundProduct(m.weight, kernel.levels, kernel.k.arrivals)
    module.launch(f"round_activations.*{KINDS[dtype]}E", device, bytes(rounding), (teams + 1, m.tokens), 4 * WARPS)
    if m.rank:
        module.launch("branch_down_int8", device, bytes(kernel), (m.rank, m.tokens), 4 * WARPS)
    _decode(module, device, kernel, blocks)
    return device.array(m.y)


def _decode(module: Module, device: Device, kernel: Int8Kernel, blocks: int) -> None:
    weight, slots, parts = kernel.k.m.weight, kernel.plan.slots, kernel.plan.parts
    planes = stored_planes(weight)
    table = TABLE_BYTES if weight.bits == 8 or (weight.bits == 4 and planes > 1) else 0
    exchange = 0 if slots == 1 else 4 * WARPS * 2 * parts * (planes + 1) * PANEL
    shared = max(table + exchange, 4 * WARPS * slots * PANEL)
    pattern = re.escape(f"decode_int8ILi{weight.bits}ELi{planes}ELi{slots}ELi{parts}E")
    module.launch(pattern, device, bytes(kernel), (ceil_div(weight.rows, PANEL), blocks), shared)
