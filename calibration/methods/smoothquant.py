"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): outliers of the inputs move into the weights, then rounding.

The weights are symmetric; the point of the method is that the activations can be quantized afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.record.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class SmoothQuantConfig(rtn.RtnConfig):
    """Options of SmoothQuant: those of rounding to nearest."""

    bits: int = field(default=8, metadata={"help": "Bits per code: 2, 3, 4 or 8."})
    format: str = field(default="symmetric", metadata={"help": "Levels: affine, symmetric, nf4, mxint."})


def quantize(problem: LayerProblem, config: SmoothQuantConfig) -> QuantizedLinear:
    """Round one layer whose inputs the driver has scaled (see `rankbook.calibration.model.scaling`)."""
    return replace(rtn.quantize(problem, config), method="smoothquant")


METHOD = Method("smoothquant", SmoothQuantConfig, quantize, scale_inputs="smoothquant")
