"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): outliers of the inputs move into the weights, then rounding.

The weights are symmetric; the point of the method is that the activations can be quantized afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.fitting.grids import round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.settings import FORMATS
from rankbook.plugins.widths import BITS


@dataclass(frozen=True)
class SmoothQuantConfig(rtn.RtnConfig):
    """Options of SmoothQuant: those of rounding to nearest."""

    bits: int = option(8, "bits of a code", choices=BITS)
    format: str = option("symmetric", "fixed levels", choices=FORMATS)


def quantize(problem: LayerProblem, config: SmoothQuantConfig) -> QuantizedLinear:
    """Round one layer whose inputs the driver has scaled (see `rankbook.calibration.driver.scaling`)."""
    return round_nearest(problem, config.grid(), "smoothquant")


METHOD = Method("smoothquant", SmoothQuantConfig, quantize, scale_inputs="smoothquant")
