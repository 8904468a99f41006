"""Launches kernels of a PTX module as launch.cu does: arguments, grids and shared memory are stated here once more."""

from __future__ import annotations

import ctypes as c
from collections.abc import Mapping
from typing import Any

import numpy as np

from rankbook.plugins import cuda_abi
from tests.plugins import emulated
from tests.plugins.ptx import machine, parser, semantics
from tests.plugins.ptx.memory import Array, Device

KINDS = {"float32": "5Float", "float16": "4Half", "bfloat16": "6BFloat"}
"""The mangled names of the types of activations."""
WARPS, PANEL = 8, 32
U_SHARES = 2
"""Blocks that share the columns of x down^T."""


class MatmulKernel(c.Structure):
    _fields_ = [
        ("m", emulated.Matmul),
        ("u", c.c_void_p),
        ("dense", c.c_void_p),
        ("shares", c.c_void_p),
        ("arrivals", c.c_void_p),
        ("first_row", c.c_int),
        ("dense_rows", c.c_int),
        ("u_shares", c.c_int),
    ]


class Split(c.Structure):
    _fields_ = [("across", c.c_int), ("steps", c.c_int), ("own", c.c_int)]


class PrefillKernel(c.Structure):
    _fields_ = [("k", MatmulKernel), ("split", Split)]


class DenseKernel(c.Structure):
    _fields_ = [
        ("w", emulated.PackedWeight),
        ("y", c.c_void_p),
        ("first_panel", c.c_int),
        ("rows", c.c_int),
    ]


class ExpertKernel(c.Structure):
    _fields_ = [("k", MatmulKernel), ("order", c.c_void_p), ("tiles", c.c_void_p)]


class Module:
    """A PTX module; kernels are parsed when they are first launched.

    Args:
        text: The PTX.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._kernels: dict[str, tuple[parser.Kernel, list[machine.Step | None]]] = {}

    def launch(self, pattern: str, device: Device, arguments: bytes, grid: tuple[int, int], shared: int = 0) -> None:
        """Run the kernel whose mangled name contains a pattern."""
        if pattern not in self._kernels:
            kernel = parser.parse(self.text, pattern)
            self._kernels[pattern] = kernel, semantics.compile_kernel(kernel)
        machine.run(*self._kernels[pattern], device, arguments, grid=grid, shared=shared, threads=machine.WARP * WARPS)


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


def stored_planes(weight: emulated.PackedWeight) -> int:
    planes = weight.params_planes - weight.has_offset
    return 4 if planes == 3 else planes


def _table_bytes(weight: emulated.PackedWeight) -> int:
    return 4 * stored_planes(weight) << weight.bits


def matmul(
    module: Module, tensors: Mapping[str, Array], attributes: Mapping[str, Any], x: Array, dtype: str, blocks: int = 1
) -> Array:
    """Run the product on x (M, K), as `emulated.matmul`.

    Args:
        module: Where the kernels are.
        tensors: Constants of the operator.
        attributes: Its attributes.
        x: (M, K) float32, or 16-bit floats as uint16 bits.
        dtype: Type of x.
        blocks: Blocks that share a panel; with more than 16 tokens all of them, 1: one for each tile.
    """
    device = Device()
    kernel = arguments_of(device, tensors, attributes, x, dtype)
    tokens, rank = kernel.m.tokens, kernel.m.rank
    if tokens <= 16:
        share_panels(device, kernel, _tile(dtype, tokens), blocks, cleared=not rank)
    if rank:
        _branch_down(module, device, kernel, dtype)
    if tokens <= 16:
        _decode(module, device, kernel, dtype, blocks)
    elif dtype != "float32" and kernel.m.weight.columns % 8 == 0 and stored_planes(kernel.m.weight) <= 2:
        _prefill(module, device, kernel, dtype, blocks)
    else:
        _product(module, device, kernel, dtype, x.dtype)
    return device.array(kernel.m.y)


def _branch_down(module: Module, device: Device, kernel: MatmulKernel, dtype: str) -> None:
    m = kernel.m
    kernel.u_shares, filler = U_SHARES, np.full((U_SHARES, m.tokens, m.rank), np.nan, np.float32)
    kernel.u = device.add(filler, writable=True)
    if m.tokens > 16 and dtype != "float32" and not m.down.scale_full and m.weight.columns % 16 == 0:
        grid, shared = (ceil_div(m.rank, 16) * U_SHARES, ceil_div(m.tokens, 8)), 4 * WARPS * 16 * 8
        module.launch(rf"branch_down_mma.*{KINDS[dtype]}ELi1E", device, bytes(kernel), grid, shared)
        return
    grid = (ceil_div(m.rank, 4) * U_SHARES, ceil_div(m.tokens, 8))
    module.launch(f"branch_downI.*{KINDS[dtype]}E", device, bytes(kernel), grid, 4 * 32 * WARPS)


def arguments_of(
    device: Device, tensors: Mapping[str, Array], attributes: Mapping[str, Any], x: Array, dtype: str
) -> MatmulKernel:
    """Return the arguments of a product, everything in the memory of the device; y holds a filler."""
    kernel = MatmulKernel(cuda_abi.product(device.add, tensors, attributes), u_shares=1)
    m = kernel.m
    m.x, m.type, m.tokens = device.add(x), emulated.TYPES[dtype], len(x)
    m.y = device.add(np.full((len(x), m.weight.rows), -1).astype(x.dtype), writable=True)
    if m.rank:
        kernel.u = device.add(np.full((len(x), m.rank), np.nan, np.float32), writable=True)
    return kernel


def share_panels(device: Device, kernel: MatmulKernel, tile: int, blocks: int, *, cleared: bool) -> None:
    """Make room for the sums of blocks that share panels, if there are several.

    Where an earlier kernel clears the counters, they hold something else before.
    """
    if blocks > 1:
        panels = ceil_div(kernel.m.weight.rows, PANEL)
        kernel.shares = device.add(np.full((blocks, panels, tile, PANEL), np.nan, np.float32), writable=True)
        kernel.arrivals = device.add(np.full(panels, 0 if cleared else 7, np.uint32), writable=True)


def experts(
    module: Module,
    tensors: Mapping[str, Array],
    attributes: Mapping[str, Any],
    x: Array,
    dtype: str,
    *,
    numbers: Array,
    tiles: bool,
) -> Array:
    """Run the product of experts on x (M, K), each token with that of its number (M,).

    Args:
        module: Where the kernels are.
        tensors: Constants of the operator.
        attributes: Its attributes.
        x: (M, K) float32, or 16-bit floats as uint16 bits.
        dtype: Type of x.
        numbers: Experts of the tokens.
        tiles: Whether tokens are ordered first, as where there are many.
    """
    device = Device()
    kernel = ExpertKernel(arguments_of(device, tensors, attributes, x, dtype))
    m, weight = kernel.k.m, kernel.k.m.weight
    m.numbers = device.add(numbers)
    panels, planes, places = ceil_div(weight.rows, PANEL), stored_planes(weight), m.tokens // 64 + m.experts
    if tiles:
        kernel.order = device.add(np.full(m.tokens, -1, np.int32), writable=True)
        kernel.tiles = device.add(np.full((places, 3), -1, np.int32), writable=True)
        module.launch("sort_tokens", device, bytes(kernel), (m.experts + 1, 1), 4 * WARPS)
    eights = 8 * places if tiles else m.tokens
    if m.rank:
        grid = (ceil_div(m.rank, 4), eights)
        module.launch(f"experts_down.*{KINDS[dtype]}E", device, bytes(kernel), grid, 4 * 32 * WARPS + 4 * (8 + WARPS))
    form = rf"ILi{weight.bits}ELi{planes}E.*{KINDS[dtype]}E"
    if dtype == "float32" or planes > 2 or weight.columns % 8 or weight.bits == 8:
        shared = max(16 << weight.bits, 4 * WARPS * 8 * PANEL)
        pattern, grid = rf"experts_floatILi{weight.bits}E", (panels, eights)
        module.launch(pattern, device, bytes(kernel), grid, shared + 4 * (8 + WARPS))
    elif tiles:
        grid, shared = (ceil_div(panels, WARPS), places), _tile_bytes(weight) + 4 * (64 + WARPS)
        module.launch(f"experts_tile_mma{form}", device, bytes(kernel), grid, shared)
    else:
        shared = max(_pair_table_bytes(weight), 4 * WARPS * 8 * PANEL) + 4 * (8 + WARPS)
        module.launch(f"experts_mma{form}", device, bytes(kernel), (panels, m.tokens), shared)
    return device.array(m.y)


def _tile(dtype: str, tokens: int) -> int:
    return next(t for t in (1, 4, 16) if t >= tokens) if dtype == "float32" else 8 * ceil_div(tokens, 8)


def _decode(module: Module, device: Device, kernel: MatmulKernel, dtype: str, blocks: int) -> None:
    weight, tile = kernel.m.weight, _tile(dtype, kernel.m.tokens)
    panels, planes = ceil_div(weight.rows, PANEL), stored_planes(weight)
    if dtype == "float32":
        pattern, table = rf"decode_floatILi{weight.bits}ELi{planes}ELi{tile}E", _table_bytes(weight)
    else:
        pattern = rf"decode_mmaILi{weight.bits}ELi{planes}ELi{tile // 8}E.*{KINDS[dtype]}E"
        table = _pair_table_bytes(weight)
    module.launch(pattern, device, bytes(kernel), (panels, blocks), max(table, 4 * WARPS * tile * PANEL))


def _pair_table_bytes(weight: emulated.PackedWeight) -> int:
    return 256 * 128 if weight.bits in (4, 8) else 0


def _tile_bytes(weight: emulated.PackedWeight) -> int:
    step, stages = (256, 2) if weight.bits == 3 else (128, 3)  # bytes of a token and step
    return _pair_table_bytes(weight) + stages * 64 * (step + (32 if weight.bits == 3 else 16))


def _prefill(module: Module, device: Device, kernel: MatmulKernel, dtype: str, blocks: int) -> None:
    weight, tokens = kernel.m.weight, kernel.m.tokens
    panels, steps = ceil_div(weight.rows, PANEL), ceil_div(weight.columns, 128 if weight.bits == 3 else 64)
    across, tiles = ceil_div(panels, WARPS), ceil_div(panels, WARPS) * ceil_div(tokens, 64)
    own = steps if blocks == 1 else ceil_div(tiles * steps, blocks)
    if own != steps:
        filler = np.full((ceil_div(steps, own) + 1, tokens, panels * PANEL), np.nan, np.float32)
        kernel.shares = device.add(filler, writable=True)
    arguments = bytes(PrefillKernel(kernel, Split(across, steps, own)))
    pattern = rf"prefill_mmaILi{weight.bits}ELi{stored_planes(weight)}E.*{KINDS[dtype]}E"
    module.launch(pattern, device, arguments, (ceil_div(tiles * steps, own), 1), _tile_bytes(weight))
    if own != steps:
        grid = (ceil_div(weight.rows, 128), ceil_div(tokens, WARPS))
        module.launch(f"add_shares.*{KINDS[dtype]}E", device, arguments, grid)


def _product(module: Module, device: Device, kernel: MatmulKernel, dtype: str, stored: Any) -> None:
    weight, tokens = kernel.m.weight, kernel.m.tokens
    filler = np.full((weight.rows, weight.columns), -1).astype(stored)
    kernel.dense, kernel.dense_rows = device.add(filler, writable=True), weight.rows
    launch_dense(module, device, weight, kernel.dense, dtype)
    if dtype == "float32":
        grid, shared = (ceil_div(weight.rows, 64), ceil_div(tokens, 64)), 2 * 16 * 68 * 4
        module.launch(f"gemm_float.*{KINDS[dtype]}E", device, bytes(kernel), grid, shared)
    else:
        grid, shared = (ceil_div(weight.rows, 64), ceil_div(tokens, 128)), 2 * (128 + 64) * 40 * 2
        module.launch(f"gemm_mma.*{KINDS[dtype]}E", device, bytes(kernel), grid, shared)


def launch_dense(module: Module, device: Device, weight: emulated.PackedWeight, y: int, dtype: str) -> None:
    steps = ceil_div(weight.columns, 4 * (32 if weight.bits == 3 else 32 // weight.bits))
    grid = (ceil_div(weight.rows, PANEL), min(64, ceil_div(steps, 4 * WARPS)))
    pattern = rf"decode_denseILi{weight.bits}ELi{stored_planes(weight)}E.*{KINDS[dtype]}E"
    module.launch(pattern, device, bytes(DenseKernel(weight, y, 0, weight.rows)), grid, _table_bytes(weight))


def gather(module: Module, tensors: Mapping[str, Array], attributes: Mapping[str, Any], indices: Array) -> Array:
    """Look up rows (..., K) float32, as `emulated.gather`."""
    device = Device()
    weight = emulated.packed_weight(device, tensors, attributes)
    y = device.add(np.zeros((*indices.shape, weight.columns), np.float32), writable=True)
    arguments = emulated.Gather(weight, device.add(indices.astype(np.int64)), y, indices.size)
    pattern = rf"gather_rowsILi{weight.bits}ELi{stored_planes(weight)}E"
    module.launch(pattern, device, bytes(arguments), (indices.size, 1), _table_bytes(weight))
    return device.array(y)
