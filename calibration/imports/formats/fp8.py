"""FP8 with one scale for a block of weights, as DeepSeek and transformers store it (quant_method fp8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankbook.calibration.imports.base import Format, Numbers, say_rounding
from rankbook.calibration.imports.floats import e4m3


def check(entry: Mapping[str, Any]) -> None:
    """Say what is not taken over."""
    say_rounding(inputs=bool(entry.get("activation_scheme")))


def numbers(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Numbers:
    """Return a layer of ``weight`` (N, K) in E4M3 and what it is multiplied by: ``weight_scale_inv`` of blocks."""
    rows, columns = entry.get("weight_block_size") or (128, 128)
    return e4m3(tensors["weight"], tensors["weight_scale_inv"], (int(rows), int(columns)), "fp8")


FORMAT = Format(
    "fp8",
    "FP8 (DeepSeek, transformers)",
    lambda entry: entry.get("quant_method") == "fp8",
    "weight_scale_inv",
    numbers,
    check,
)
