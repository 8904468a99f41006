"""AWQ (Lin et al. 2024, arXiv 2306.00978): activation-aware input scaling, then rounding with a searched range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option


@dataclass(frozen=True)
class AwqConfig(rtn.RtnConfig):
    """Options of AWQ: those of rounding to nearest."""

    method: ClassVar[str] = "awq"
    clip_search: bool = option(True, "search the range of each group by weighted error")


METHOD = Method("awq", AwqConfig, rtn.quantize, weighs_inputs=AwqConfig.weighs_inputs, scale_inputs="awq")
