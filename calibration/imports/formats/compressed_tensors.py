"""compressed-tensors (LLM Compressor): packed integers of 2 to 8 bits, NVFP4 and MXFP4."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, affine, check_order, unpacked
from rankbook.calibration.imports.fp4 import e2m1, mxfp4
from rankbook.calibration.notes import note
from rankbook.calibration.record.quantized_linear import QuantizedLinear

FORMATS = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats of layers that can be imported."""
METHOD = "compressed-tensors"


def check(entry: Mapping[str, Any]) -> None:
    """Refuse formats of another kind and rotated weights; say that rounding of activations is not taken over."""
    for name in ("transform_config", "sparsity_config"):
        if (held := entry.get(name)) and held.get("config_groups", held.get("format") not in (None, "dense")):
            raise ImportRefusedError(f"its {name} changes what the layers compute besides their weights")
    found = {str(group.get("format") or entry.get("format")) for group in _groups(entry)}
    if unknown := sorted(found - {*FORMATS}):
        raise ImportRefusedError(f"format {', '.join(unknown)} is not known; import reads {', '.join(FORMATS)}")
    if any(group.get("input_activations") for group in _groups(entry)):
        note("the source rounds the inputs of its layers as well; the weights alone are imported")


def record(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> QuantizedLinear:
    """Return the record of a layer of ``weight_packed`` and ``weight_scale``.

    Integers are ``weight_packed`` (N, K b / 32) int32 with zero points (N b / 32, G), both shifted by ``2**(b - 1)``;
    FP4 is ``weight_packed`` (N, K / 2) uint8, with scales (N, G) in E4M3 over a global one, or in E8M0.
    """
    packed, scales = tensors["weight_packed"], tensors["weight_scale"]
    if packed.dtype == torch.uint8:
        codes = unpacked(packed, 4, 2 * packed.shape[1])
        if "weight_global_scale" not in tensors:
            return mxfp4(codes, scales, METHOD)
        return e2m1(codes, scales.float() / tensors["weight_global_scale"].float(), METHOD)
    rows, columns = tensors["weight_shape"].tolist()
    bits = next((b for b in range(2, 9) if -(-columns * b // 32) == packed.shape[1]), None)
    if bits is None or packed.shape[0] != rows:
        raise ImportRefusedError(
            f"weight_packed {tuple(packed.shape)} is no dense packing of {rows} x {columns} weights"
        )
    scales = scales.reshape(rows, -1) if scales.numel() > 1 else scales.reshape(1, 1).expand(rows, 1)
    check_order(tensors, "weight_g_idx", columns, scales.shape[1])
    zeros: Tensor | int = 1 << (bits - 1)
    if "weight_zero_point" in tensors:
        zeros = unpacked(tensors["weight_zero_point"].T, bits, rows).T.int()
    return affine(unpacked(packed, bits, columns), bits, scales, zeros, METHOD)


def _groups(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for group in (entry.get("config_groups") or {}).values():
        yield group if isinstance(group, Mapping) else {}


FORMAT = Format(
    METHOD,
    "compressed-tensors (LLM Compressor)",
    lambda entry: entry.get("quant_method") == METHOD,
    "weight_packed",
    record,
    check,
)
