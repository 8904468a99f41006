"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): outliers of the inputs move into the weights, then rounding.

The weights are symmetric; the point of the method is that the activations can be quantized afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.settings import FORMATS
from rankbook.plugins.widths import BITS


@dataclass(frozen=True)
class SmoothQuantConfig(rtn.RtnConfig):
    """Options of SmoothQuant: those of rounding to nearest."""

    method: ClassVar[str] = "smoothquant"
    bits: int = option(8, "bits of a code", choices=BITS)
    format: str = option("symmetric", "fixed levels", choices=FORMATS)


METHOD = Method(
    "smoothquant",
    SmoothQuantConfig,
    rtn.quantize,
    weighs_inputs=SmoothQuantConfig.weighs_inputs,
    scale_inputs="smoothquant",
)
