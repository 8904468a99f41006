"""OmniQuant's learned weight clipping (Shao et al. 2024, arXiv 2308.13137): the range of each group, trained by block.

It is LCQ at rank one with evenly spaced levels that stay as they are. The offset is real, as everywhere in the records.
The equivalent transformation, which the official scripts for weight-only LLaMA do not learn either, is left out;
``--scale-inputs`` takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rankbook.calibration.fitting.grids import round_nearest
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods import rtn
from rankbook.calibration.methods.base import Method
from rankbook.calibration.methods.lrq import STEPS
from rankbook.calibration.option import option
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.settings import EFFORTS
from rankbook.calibration.training.reconstruct import COMPUTE, TrainableLayer, TrainConfig, train_block
from rankbook.calibration.training.trained_codebooks import TrainedCodebooks

_RATE = 1e-2
"""Step size of the official code, for 5120 steps; fewer take larger ones, `_REACH` over their number."""
_REACH = 3.0


@dataclass(frozen=True)
class OmniQuantConfig(rtn.RtnConfig):
    """Options of learned clipping: those of asymmetric rounding to nearest, and of training."""

    clip_search: bool = option(True, "search the range of each group before training")
    effort: str = option("default", "fast: no training; default, high: trained by block", choices=EFFORTS)
    steps: int = option(0, "training steps per block; 0 takes what the effort asks for", least=0)
    rate: float = option(0.0, "step size of the ranges' logits; 0 goes by the steps")
    batch: int = option(1, "calibration sequences per training step", least=1)
    compute: str = option("auto", "arithmetic of training", choices=COMPUTE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format != "affine":
            raise ValueError(f"weight format {self.format!r} cannot be clipped on two sides; leave it at affine")

    def training_steps(self) -> int:
        """Return the training steps per block."""
        return self.steps or STEPS[self.effort]

    def trains(self) -> bool:
        """Return whether blocks are trained."""
        return self.training_steps() > 0


def quantize(problem: LayerProblem, config: OmniQuantConfig) -> QuantizedLinear:
    """Round one layer to nearest: where training starts."""
    return round_nearest(problem, config.grid(), "omniquant")


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: OmniQuantConfig
) -> dict[str, QuantizedLinear]:
    """Train the ranges of a block by its output; with effort ``fast`` the records are returned as they are."""
    steps = config.training_steps()
    if not steps or not records:
        return dict(records)
    rate = config.rate or max(_RATE, _REACH / steps)
    layers: dict[str, TrainableLayer] = {
        name: TrainedCodebooks(problem.layers[name].weight, record, "straight-through", rate)
        for name, record in records.items()
    }
    train = TrainConfig(steps=steps, batch=config.batch, compute=config.compute)
    return train_block(problem, records, layers, train).records


METHOD = Method("omniquant", OmniQuantConfig, quantize, refine, OmniQuantConfig.trains)
