"""AWQ (Lin et al. 2024, arXiv 2306.00978): activation-aware input scaling, then rounding with a searched range."""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.fitting.grids import round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class AwqConfig(rtn.RtnConfig):
    """Options of AWQ: those of rounding to nearest."""

    clip_search: bool = option(True, "search the range of each group by weighted error")


def quantize(problem: LayerProblem, config: AwqConfig) -> QuantizedLinear:
    """Round one layer whose inputs the driver has scaled (see `rankbook.calibration.driver.scaling`)."""
    return round_nearest(problem, config.grid(), "awq")


METHOD = Method("awq", AwqConfig, quantize, scale_inputs="awq")
