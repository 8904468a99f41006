"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): a fixed format's grid, codes chosen with error feedback.

The grids of all groups are set before the first column is rounded, from the original weights ("static groups" of the
official code), so that columns can be taken in order of falling input energy without group indices in the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from rankbook.calibration.fitting.grids import round_with_feedback
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class GptqConfig(rtn.RtnConfig):
    """Options of GPTQ: those of rounding to nearest, and of the order of columns."""

    act_order: bool = option(True, "round the columns with the most input energy first")
    damping: float = option(0.01, "share of the mean input energy added to the Gram matrix")


def quantize(problem: LayerProblem, config: GptqConfig) -> QuantizedLinear:
    """Quantize one layer.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    return round_with_feedback(problem, config.grid(), "gptq", damping=config.damping, by_energy=config.act_order)


METHOD = Method("gptq", GptqConfig, quantize, feedback=True)
