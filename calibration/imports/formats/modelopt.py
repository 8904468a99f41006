"""NVIDIA ModelOpt: NVFP4, FP8, MXFP4, W4A16 and W8A8, as its unified Hugging Face export writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, say_rounding, unpacked
from rankbook.calibration.imports.floats import e4m3, mxfp4, nvfp4, scales_of_rows

METHOD = "modelopt"
_ROUNDS_INPUTS = (
    *("NVFP4", "NVFP4_AWQ", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"),
    *("W4A8_AWQ", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "W8A8_SQ_PER_CHANNEL"),
)
_BLOCK = (128, 128)
"""Of scales for blocks of FP8, as far as they are not those of rows."""


def check(entry: Mapping[str, Any]) -> None:
    """Say what is not taken over."""
    cache = bool(entry.get("kv_cache_scheme") or entry.get("kv_cache_quant_algo"))
    say_rounding(inputs=entry.get("quant_algo") in _ROUNDS_INPUTS, cache=cache)


def numbers(tensors: Mapping[str, Tensor], _: Mapping[str, Any]) -> Numbers:
    """Return a layer of ``weight`` and ``weight_scale``; dtypes and shapes say which format it is in.

    NVFP4 is (N, K / 2) uint8 with scales (N, K / 16) in E4M3 times ``weight_scale_2``; MXFP4 the same with exponents
    (N, K / 32) in E8M0; integers of 4 bits are (N / 2, K) uint8, two rows in a byte; FP8 is E4M3, and W8A8 int8.

    Raises:
        ImportRefusedError: Another format, or inputs that the layer multiplies by factors of its own.
    """
    weight, scales = tensors.get("weight"), tensors["weight_scale"]
    if weight is None:
        raise ImportRefusedError("it has weight_scale and no weight; the checkpoint is damaged, download it again")
    factors = tensors.get("pre_quant_scale")
    if factors is not None and not bool((factors == 1).all()):
        raise ImportRefusedError(
            "it multiplies its inputs by factors of its own (pre_quant_scale, AWQ), which a record has no place for;"
            " take a version in NVFP4 or FP8"
        )
    second = tensors.get("weight_scale_2")
    if weight.dtype == torch.float8_e4m3fn:
        return e4m3(weight, _squeezed(scales), _BLOCK, METHOD)
    if weight.dtype == torch.int8:
        codes = (weight.short() + 128).to(torch.uint8)
        return Numbers(codes, 8, [scales_of_rows(scales.double(), weight.shape, None)], METHOD, zeros=128)
    if weight.dtype != torch.uint8 or weight.ndim != 2:
        raise ImportRefusedError(f"its weight is {weight.dtype} {tuple(weight.shape)}; no known format has that")
    if scales.dtype == torch.float8_e4m3fn:
        if second is None:
            raise ImportRefusedError("it has scales in E4M3 and no weight_scale_2; download it again")
        return nvfp4(unpacked(weight, 4, 2 * weight.shape[1]), scales, second, METHOD)
    if scales.dtype == torch.uint8:
        return mxfp4(unpacked(weight, 4, 2 * weight.shape[1]), scales.reshape(len(weight), -1), METHOD)
    if second is not None:
        raise ImportRefusedError(
            "it is rounded to integers and to FP8 behind them (W4A8); take a version in NVFP4 or FP8"
        )
    codes = torch.stack([weight & 15, weight >> 4], 1).flatten(0, 1)
    return Numbers(codes ^ 8, 4, [scales_of_rows(scales.double(), codes.shape, None)], METHOD, zeros=8)


def _squeezed(scales: Tensor) -> Tensor:
    """Return scales of blocks (A, 1, B, 1) as (A, B), others as they are."""
    return scales[:, 0, :, 0] if scales.ndim == 4 else scales


def claims(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry is of ModelOpt; it may name the library instead of a method."""
    return METHOD in (str(entry.get("quant_method", ""))[: len(METHOD)], entry.get("quant_library"))


FORMAT = Format(METHOD, "NVIDIA ModelOpt", claims, "weight_scale", numbers, check)
