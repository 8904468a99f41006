"""compressed-tensors (LLM Compressor): packed and plain integers, FP8, NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, check_order, say_rounding, unpacked
from rankbook.calibration.imports.floats import e4m3, mxfp4, nvfp4, scales_of_rows

FORMATS = (
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
)
"""Formats of layers that can be imported."""
METHOD = "compressed-tensors"


def check(entry: Mapping[str, Any]) -> None:
    """Refuse formats of another kind and rotated weights; say that rounding of activations is not taken over."""
    for name in ("transform_config", "sparsity_config"):
        if (held := entry.get(name)) and held.get("config_groups", held.get("format") not in (None, "dense")):
            raise ImportRefusedError(f"its {name} changes what the layers compute besides their weights")
    named = {str(group.get("format") or entry.get("format")) for group in _groups(entry)}
    found = named - {"mixed-precision"}  # each group has a format of its own then
    if unknown := sorted(found - {*FORMATS}):
        raise ImportRefusedError(f"format {', '.join(unknown)} is not known; import reads {', '.join(FORMATS)}")
    inputs = any(group.get("input_activations") for group in _groups(entry))
    say_rounding(inputs=inputs, cache=bool(entry.get("kv_cache_scheme")))


def numbers(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Numbers:
    """Return a layer of ``weight_scale`` and ``weight_packed`` or, one element for each weight, ``weight``.

    Integers are ``weight_packed`` (N, K b / 32) int32 with zero points (N b / 32, G), both shifted by ``2**(b - 1)``,
    or ``weight`` (N, K) int8 with zero points (N, G); FP4 is ``weight_packed`` (N, K / 2) uint8, with scales (N, G) in
    E4M3 over a global one, or in E8M0; FP8 is ``weight`` in E4M3.
    """
    scales = tensors["weight_scale"]
    if "weight_packed" not in tensors:
        return _plain(tensors, scales, entry)
    packed = tensors["weight_packed"]
    if packed.dtype == torch.uint8:
        codes = unpacked(packed, 4, 2 * packed.shape[1])
        if "weight_global_scale" not in tensors:
            return mxfp4(codes, scales, METHOD)
        scales = scales.float() / tensors["weight_global_scale"].float()  # no product: it may round otherwise
        return nvfp4(codes, scales, 1.0, METHOD)
    rows, columns = tensors["weight_shape"].tolist()
    widths = {int(bits) for group in _groups(entry) if (bits := (group.get("weights") or {}).get("num_bits"))}
    bits = next((b for b in sorted(widths or range(2, 9)) if -(-columns * b // 32) == packed.shape[1]), None)
    if bits is None or packed.shape[0] != rows:
        raise ImportRefusedError(f"weight_packed {tuple(packed.shape)} is no dense packing of {rows} x {columns}")
    scales = scales_of_rows(scales, torch.Size((rows, columns)), None)
    check_order(tensors, "weight_g_idx", columns, scales.shape[1])
    zeros: Tensor | int = 1 << (bits - 1)
    if "weight_zero_point" in tensors:
        zeros = unpacked(tensors["weight_zero_point"].T, bits, rows).T.int()
    return Numbers(unpacked(packed, bits, columns), bits, [scales], METHOD, zeros=zeros)


def _plain(tensors: Mapping[str, Tensor], scales: Tensor, entry: Mapping[str, Any]) -> Numbers:
    """Return a layer of one element for each weight."""
    weight = tensors.get("weight")
    if weight is None:
        raise ImportRefusedError("it has weight_scale, and neither weight_packed nor weight; download it again")
    if weight.dtype != torch.int8:
        return e4m3(weight, scales, _block(entry), METHOD)
    zeros: Tensor | int = 128
    scales = scales_of_rows(scales, weight.shape, None)
    check_order(tensors, "weight_g_idx", weight.shape[1], scales.shape[1])
    if "weight_zero_point" in tensors:
        zeros = scales_of_rows(tensors["weight_zero_point"].int() + 128, weight.shape, None)
    return Numbers((weight.short() + 128).to(torch.uint8), 8, [scales], METHOD, zeros=zeros)


def _block(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the block that scales are of, where one is named."""
    shapes = [(group.get("weights") or {}).get("block_structure") for group in _groups(entry)]
    found = {tuple(shape) for shape in shapes if isinstance(shape, list)}
    return (int(next(iter(found))[0]), int(next(iter(found))[1])) if len(found) == 1 else None


def _groups(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in (entry.get("config_groups") or {}).values():
        yield group if isinstance(group, Mapping) else {}


FORMAT = Format(
    METHOD,
    "compressed-tensors (LLM Compressor)",
    lambda entry: entry.get("quant_method") == METHOD,
    "weight_scale",
    numbers,
    check,
)
