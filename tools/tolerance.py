"""What a comparison must know about the roundings of an exported file: how close it can be, and to which model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankbook.tools.backends.torch import TorchModel
    from rankbook.tools.onnx_file import OnnxFile

TOLERANCE = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference relative to the largest value, by activation type: some tens of roundings in a row per layer."""
ROUNDED_TOLERANCE = 5e-2
"""The same where inputs or the cache are rounded to 8 bits: a last digit that differs moves a value by a whole step."""


def default_tolerance(file: OnnxFile) -> float:
    """Return the largest relative difference that passes by what a file rounds."""
    tolerance = TOLERANCE.get(file.metadata.get("rankbook.dtype", "fp32"), TOLERANCE["fp32"])
    rounds = file.metadata.get("rankbook.kv") == "int8" or file.metadata.get("rankbook.activations", "none") != "none"
    return max(tolerance, ROUNDED_TOLERANCE) if rounds else tolerance


def match_settings(file: OnnxFile, torch_model: TorchModel) -> None:
    """Take from the torch model the settings of activations and cache that the file was exported without."""
    from rankbook.calibration.runtime import override

    if file.metadata.get("rankbook.activations", "none") == "none":
        override(torch_model.model, kind="none", kv_bits=0)
