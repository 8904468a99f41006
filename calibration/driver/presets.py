"""Presets: one word for the choices of a run. What is given beside one goes before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankbook.calibration.option import choose


@dataclass(frozen=True)
class Preset:
    """One preset.

    Attributes:
        values: Options by name, as `rankbook.calibration.driver.options.QuantizeOptions` has them.
        text: What it does and costs.
    """

    values: Mapping[str, Any]
    text: str


PRESETS: Mapping[str, Preset] = {
    "fast": Preset(
        {"method": "rtn", "bits": 4, "group_size": 32},
        "rounding to nearest (rtn), 4 bits, groups of 32: no text is read and no block runs, so it takes little"
        " longer than reading and writing the model. SmolLM2-135M with groups of 64: perplexity 35.38, unquantized"
        " 28.48",
    ),
    "balanced": Preset(
        {"method": "lcq", "bits": 4, "rank": 1, "effort": "fast"},
        "codebooks of rank 1 in closed form (lcq, effort fast), 4 bits: blocks run over the calibration text, nothing"
        " is trained. At 3 bits, rank 2, it closes 84.1 % of the gap between rtn and the original, training 90.4 %",
    ),
    "best": Preset(
        {"method": "lcq", "bits": 4, "rank": 1, "effort": "high"},
        "the same, and 600 training steps for each block. 100 steps (effort default) take 363 CPU seconds for"
        " SmolLM2-135M and give perplexity 28.98; time grows with the steps. Give --calib a text like your use",
    ),
}
"""Presets by name; measurements are from docs/accuracy.md."""


def with_preset(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with those of a preset where they say nothing.

    Raises:
        ValueError: No such preset.
    """
    choose("preset", name, tuple(PRESETS))
    method = values.get("method")
    preset = PRESETS[name].values
    if method not in (None, preset["method"]):
        raise ValueError(f"preset {name!r} is method {preset['method']!r}; leave --method {method} or the preset out")
    return {**preset, **values}
