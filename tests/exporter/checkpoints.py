"""Quantized tiny models of every family, for the tests of the exporter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from tests.tiny import tiny_model, write_text

FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"bits": 3},
    "opt": {"bits": 2, "error_branch": "lqer", "error_rank": 3},
    "qwen2": {"bits": 4, "group_size": "channel"},
    "qwen3": {"bits": 8, "param_bits": 16},
    "mistral": {"bits": 3, "error_branch": "lqer", "error_rank": 4, "factor_bits": 16},
    "gemma2": {"bits": 4, "skip": ("*.o_proj",)},
    "phi3": {"bits": 4, "error_branch": "lqer", "error_rank": 2},
}
"""Options that differ between the families, so that together they cover every operator and stored form."""


def make_checkpoint(folder: Path, family: str, *, model: dict[str, Any] | None = None, **options: Any) -> Path:
    """Quantize a tiny model of ``family`` into ``folder / "checkpoint"`` and return that folder."""
    tiny_model(family, folder / "model", **(model or {}))
    text = write_text(folder / "text.txt")
    chosen = {"method": "rtn", "group_size": 16, "calib": str(text), "calib_sequences": 2, "calib_length": 16}
    quantize_model(folder / "model", folder / "checkpoint", QuantizeOptions(**{**chosen, **options}))
    return folder / "checkpoint"
