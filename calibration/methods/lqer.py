"""LQER and L2QER (Zhang et al. 2024, arXiv 2402.02446): block floating point plus a low-rank error branch.

With ``error_branch="qera"`` or ``"qera-diag"`` it is QERA (Zhang et al. 2024, arXiv 2410.06040) on the same base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rankbook.calibration.fitting.error_branch import fit_error_branch
from rankbook.calibration.fitting.grids import round_nearest
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.settings import ERROR_BRANCHES, FORMATS, INPUT_BRANCHES


@dataclass(frozen=True)
class LqerConfig(rtn.RtnConfig):
    """Options of the LQER family: those of rounding to nearest, and the branch."""

    group_size: int = option(32, "weights of one row that share an exponent or scale")
    format: str = option("mxint", "fixed levels", choices=FORMATS)
    error_branch: str = option("l2qer", "kind of the error branch", choices=ERROR_BRANCHES)
    error_rank: int = option(32, "rank of the error branch", least=0)
    factor_bits: int = option(8, "bits of the branch's factors: 8 or 16")
    passes: int = option(1, "rounds of quantizing what the branch leaves and refitting the branch", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor_bits not in (8, 16, 32):
            raise ValueError(f"factor_bits {self.factor_bits} is not supported; choose 8 or 16")

    def weighs_inputs(self) -> bool:
        """Return whether the inputs of a layer matter: for the branch, or in a search of ranges."""
        return super().weighs_inputs() or (self.error_rank > 0 and self.error_branch in INPUT_BRANCHES)


def quantize(problem: LayerProblem, config: LqerConfig) -> QuantizedLinear:
    """Round one layer and fit its branch.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    record = round_nearest(problem, config.grid(), "lqer")
    branch = fit_error_branch(problem, record, config.error_branch, config.error_rank, config.factor_bits)
    for _ in range(config.passes - 1):
        if branch is None:
            break
        rest = replace(problem, weight=problem.weight - branch.dense())
        record = round_nearest(rest, config.grid(), "lqer")
        branch = fit_error_branch(problem, record, config.error_branch, config.error_rank, config.factor_bits)
    return record.with_low_rank(branch)


METHOD = Method("lqer", LqerConfig, quantize, weighs_inputs=LqerConfig.weighs_inputs)
