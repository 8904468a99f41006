"""LQER and L2QER (Zhang et al. 2024, arXiv 2402.02446): block floating point plus a low-rank error branch.

With ``error_branch="qera"`` or ``"qera-diag"`` it is QERA (Zhang et al. 2024, arXiv 2410.06040) on the same base.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rankbook.calibration.fitting.error_branch import ERROR_BRANCHES, fit_error_branch
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.record.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class LqerConfig(rtn.RtnConfig):
    """Options of the LQER family: those of rounding to nearest, and the branch."""

    group_size: int = field(default=32, metadata={"help": "Weights of one row that share an exponent or scale."})
    format: str = field(default="mxint", metadata={"help": "Levels: affine, symmetric, nf4, mxint."})
    error_branch: str = field(default="l2qer", metadata={"help": f"Error branch: {', '.join(ERROR_BRANCHES)}."})
    error_rank: int = field(default=32, metadata={"help": "Rank of the error branch."})
    factor_bits: int = field(default=8, metadata={"help": "Bits of the branch's factors: 8 or 16."})
    passes: int = field(
        default=1, metadata={"help": "Rounds of rounding what the branch leaves, then fitting it again."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error_branch not in ERROR_BRANCHES:
            raise ValueError(
                f"error branch {self.error_branch!r} is unknown; choose one of {', '.join(ERROR_BRANCHES)}"
            )
        if self.error_rank < 0 or self.passes < 1:
            raise ValueError(f"error_rank {self.error_rank} and passes {self.passes} must be at least 0 and 1")
        if self.factor_bits not in (8, 16, 32):
            raise ValueError(f"factor_bits {self.factor_bits} is not supported; choose 8 or 16")


def quantize(problem: LayerProblem, config: LqerConfig) -> QuantizedLinear:
    """Round one layer and fit its branch.

    Raises:
        ValueError: The group size does not divide the layer, or weights or statistics are not finite.
    """
    record = rtn.quantize(problem, config)
    branch = fit_error_branch(problem, record, config.error_branch, config.error_rank, config.factor_bits)
    for _ in range(config.passes - 1):
        if branch is None:
            break
        record = rtn.quantize(replace(problem, weight=problem.weight - branch.dense()), config)
        branch = fit_error_branch(problem, record, config.error_branch, config.error_rank, config.factor_bits)
    return replace(record, low_rank=branch, method="lqer")


METHOD = Method("lqer", LqerConfig, quantize)
