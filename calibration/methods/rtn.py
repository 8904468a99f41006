"""RTN: every weight to the nearest level of a fixed format, with an optional search of the clipping range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rankbook.calibration.fitting.grids import Grid, round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import Options, option
from rankbook.calibration.record.codebooks import LEVEL_DTYPES
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.settings import EFFORTS, FORMATS
from rankbook.plugins.widths import BITS


@dataclass(frozen=True)
class RtnConfig(Options):
    """Options of rounding to nearest.

    Attributes:
        method: What records say that they were made with; methods that end in such a rounding have their own.
    """

    method: ClassVar[str] = "rtn"

    bits: int = option(3, "bits of a code", choices=BITS)
    group_size: int = option(64, "weights of one row that share a scale")
    format: str = option("affine", "fixed levels", choices=FORMATS)
    clip_search: bool = option(False, "search the range of each group by weighted error")
    param_bits: int = option(8, "bits of each parameter of a group: 8 or 16")
    level_dtype: str = option("int8", "storage of NF4 levels; int8 uses 7 bits", choices=tuple(LEVEL_DTYPES))
    effort: str = option("default", "without effect: rounding has one effort", choices=EFFORTS)
    seed: int = option(0, "without effect: rounding is deterministic")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grid()

    def grid(self) -> Grid:
        """Return the grid that weights are rounded to."""
        return Grid(self.bits, self.group_size, self.format, self.clip_search, self.param_bits, self.level_dtype)

    def weighs_inputs(self) -> bool:
        """Return whether the inputs of a layer matter: they weigh the errors in a search of ranges."""
        return self.clip_search


def quantize(problem: LayerProblem, config: RtnConfig) -> QuantizedLinear:
    """Round one layer to nearest; its inputs may have been scaled (see `rankbook.calibration.driver.scaling`).

    Raises:
        ValueError: The group size does not divide the layer, or the weights are not finite.
    """
    return round_nearest(problem, config.grid(), config.method)


METHOD = Method("rtn", RtnConfig, quantize, weighs_inputs=RtnConfig.weighs_inputs)
