"""OmniQuant's learned weight clipping (Shao et al. 2024, arXiv 2308.13137): the range of each group, trained by block.

It is LCQ at rank one with evenly spaced levels that stay as they are. The offset is real, as everywhere in the records.
The equivalent transformation, which the official scripts for weight-only LLaMA do not learn either, is left out;
``--scale-inputs`` takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rankbook.calibration.fitting.problem import BlockProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training.reconstruct import TrainingOptions, train_records
from rankbook.calibration.training.trained_codebooks import TrainedCodebooks

_RATE = 1e-2
"""Step size of the official code, for 5120 steps; fewer take larger ones, `_REACH` over their number."""
_REACH = 3.0


@dataclass(frozen=True)
class OmniQuantConfig(TrainingOptions, rtn.RtnConfig):
    """Options of learned clipping: those of asymmetric rounding to nearest, and of training."""

    method: ClassVar[str] = "omniquant"
    clip_search: bool = option(True, "search the range of each group before training")
    seed: int = option(0, "seed of the batch order in training")
    rate: float = option(0.0, "step size of the ranges' logits; 0 derives it from the steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format != "affine":
            raise ValueError(f"weight format {self.format!r} cannot be clipped on two sides; leave it at affine")


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: OmniQuantConfig
) -> dict[str, QuantizedLinear]:
    """Train the ranges of a block, see `train_records`."""
    rate = config.rate or max(_RATE, _REACH / max(1, config.training_steps()))
    return train_records(
        problem, records, config, lambda part, record: TrainedCodebooks(part.weight, record, "straight-through", rate)
    )


METHOD = Method("omniquant", OmniQuantConfig, rtn.quantize, refine, OmniQuantConfig.trains)
