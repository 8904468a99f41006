"""The CUDA kernels as operators of PyTorch: ``rankbook::product`` and ``rankbook::rows``.

Both have a fake kernel, so that torch.compile traces them, and no gradient: layers that need one decode their weight.
What computes them is found by the type of the device in `kernels`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rankbook.calibration.record.compact import widened
from rankbook.plugins import cuda_abi, library
from rankbook.plugins.contract import CUDA_COLUMNS, CUDA_PLANES
from rankbook.plugins.layer_spec import LayerSpec

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types of x, in the order of `rankbook.plugins.cuda_abi.TYPES`."""
CARRIER = 0x80
"""What codes as stored and codes as the kernels read them differ by, in each byte."""
_ALIGNMENT = 256
"""Of scratch memory, in bytes."""


class KernelLibrary(Protocol):
    """What computes on one kind of device, see `rankbook.plugins.cuda_abi.Kernels`."""

    def workspace(self, arguments: cuda_abi.Matmul) -> int:
        """Return the bytes of scratch of a product."""

    def matmul(self, arguments: cuda_abi.Matmul, stream: int) -> None:
        """Compute a product."""

    def gather(self, arguments: cuda_abi.Gather, stream: int) -> None:
        """Look up rows."""


def unavailable(kind: str) -> str | None:
    """Return why no kernels compute packed layers on a kind of device, or None where some do."""
    if kind in OTHERS:
        return None
    if kind != "cuda":
        return f"there are no kernels for tensors on {kind}"
    return library.unavailable("ort-cuda")


def serves(spec: LayerSpec, kind: str) -> bool:
    """Return whether there are kernels for a layer on a kind of device."""
    return spec.planes <= CUDA_PLANES and spec.in_features <= CUDA_COLUMNS and unavailable(kind) is None


def kernels(kind: str) -> KernelLibrary:
    """Return what computes on a kind of device.

    Raises:
        FileNotFoundError: Its library is not built.
        RuntimeError: The library is of another version.
    """
    return OTHERS.get(kind) or _cuda()


OTHERS: dict[str, KernelLibrary] = {}
"""Kernels for other kinds of device than CUDA, by type; tests put the emulation here."""


@functools.cache
def _cuda() -> KernelLibrary:
    return cuda_abi.Kernels(library.library("ort-cuda"))


def constants(spec: LayerSpec, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the constants of a layer's operators by formal name, as the kernels read them, from its packed tensors.

    They share memory with the packed tensors where the bytes are the same; codes are those of `layout.to_carrier`.
    Packed tensors may be stacks of experts, with one axis more in front.
    """
    found = {name: tensor.contiguous() for name, tensor in widened(packed, spec).items()}
    levels, bias = found["levels"].to(torch.float16), found.get("bias")
    ones = torch.ones_like(levels[..., :1, :])
    found["levels"] = torch.cat([levels, ones], -2) if spec.has_offset else levels
    found["codes"] = (found["codes"] ^ CARRIER).view(torch.int8)
    none = levels.new_zeros(*levels.shape[:-2], 1, dtype=torch.float32)
    found["bias"] = none if bias is None else bias.float()
    return found


def product(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: LayerSpec,
    *,
    int8_activations: bool = False,
    numbers: Tensor | None = None,
) -> Tensor:
    """Return ``x @ W.T + bias``, with the error branch, for x (..., K) in one of `TYPES`.

    Args:
        x: Activations.
        tensors: What `constants` returns, on the device of x.
        spec: The layer.
        int8_activations: Round x to 8 bits inside.
        numbers: Of stacks, the expert of each row of x, int64 (...); rows of an expert that does not exist give NaN.
    """
    names = _ORDER if spec.branch_rank else _ORDER[:6]
    constants = [tensors[name] for name in names]
    y: Tensor = torch.ops.rankbook.product(x, constants, _sizes(spec), int8_activations, numbers)
    return y


def rows(ids: Tensor, tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """Return rows (..., K) float32 of ids (...) int64; ids outside of the rows give NaN."""
    y: Tensor = torch.ops.rankbook.rows(ids, [tensors[name] for name in _ORDER[:5]], _sizes(spec))
    return y


_ORDER = ("codes", "levels", "params", "step", "base", "bias", "down", "down_scale", "up", "up_scale")


def _sizes(spec: LayerSpec) -> list[int]:
    return [spec.in_features, spec.out_features, int(spec.has_offset)]


def _attributes(sizes: list[int]) -> dict[str, int]:
    return dict(zip(("in_features", "out_features", "offset"), sizes, strict=True))


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """Make a device the current one and yield its current stream; 0 where there are none."""
    if device.type != "cuda":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


@torch.library.custom_op("rankbook::product", mutates_args=())
def _product(
    x: Tensor, tensors: list[Tensor], sizes: list[int], int8_activations: bool, numbers: Tensor | None = None
) -> Tensor:
    computes = kernels(x.device.type)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.data_ptr() % _ALIGNMENT:  # a slice of another tensor; kernels read whole vectors
        flat = flat.clone()
    y = x.new_empty(*x.shape[:-1], sizes[1])
    if not y.numel():
        return y
    arguments = cuda_abi.product(_address, dict(zip(_ORDER, tensors, strict=False)), _attributes(sizes))
    arguments.x, arguments.y, arguments.tokens = flat.data_ptr(), y.data_ptr(), flat.shape[0]
    arguments.type, arguments.int8_activations = TYPES.index(x.dtype), int8_activations
    if numbers is not None:
        numbers = numbers.to(torch.int64).contiguous()
        arguments.numbers = numbers.data_ptr()
    scratch = x.new_empty(computes.workspace(arguments) + _ALIGNMENT, dtype=torch.uint8)
    arguments.workspace = scratch.data_ptr() + -scratch.data_ptr() % _ALIGNMENT
    with _current(x.device) as stream:
        computes.matmul(arguments, stream)
    return y


@_product.register_fake
def _(
    x: Tensor,
    tensors: list[Tensor],  # noqa: ARG001
    sizes: list[int],
    int8_activations: bool,  # noqa: ARG001
    numbers: Tensor | None = None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[1])


@torch.library.custom_op("rankbook::rows", mutates_args=())
def _rows(ids: Tensor, tensors: list[Tensor], sizes: list[int]) -> Tensor:
    computes = kernels(ids.device.type)
    ids = ids.to(torch.int64).contiguous()
    y = ids.new_empty(*ids.shape, sizes[0], dtype=torch.float32)
    if not y.numel():
        return y
    weight = cuda_abi.packed_weight(_address, dict(zip(_ORDER, tensors, strict=False)), _attributes(sizes))
    arguments = cuda_abi.Gather(weight, ids.data_ptr(), y.data_ptr(), ids.numel())
    with _current(ids.device) as stream:
        computes.gather(arguments, stream)
    return y


@_rows.register_fake
def _(ids: Tensor, tensors: list[Tensor], sizes: list[int]) -> Tensor:  # noqa: ARG001
    return ids.new_empty(*ids.shape, sizes[0], dtype=torch.float32)
