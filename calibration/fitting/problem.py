"""What a method is given: one linear layer, or one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.memory import relieve
from rankbook.calibration.record.finite import is_finite


@dataclass(frozen=True)
class LayerProblem:
    """One linear layer to quantize.

    Attributes:
        name: Name of the layer within its block, e.g. ``self_attn.q_proj``.
        weight: (N, K) float32.
        bias: (N,) or None.
        statistics: Of the layer's calibration inputs.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    statistics: LayerStatistics

    def check(self) -> None:
        """Check that weights and statistics can be computed with.

        Raises:
            ValueError: They hold NaN or infinity.
        """
        if not is_finite(self.weight):
            raise ValueError(f"the weights of {self.name} hold NaN or infinity; repair or re-download the model")
        if not (is_finite(self.statistics.gram) and is_finite(self.statistics.peak)):
            raise ValueError(
                f"the input statistics of {self.name} hold NaN or infinity: the model overflows even in float32;"
                " convert it again"
            )


@dataclass(frozen=True)
class BlockProblem:
    """One transformer block whose output is to be reproduced with quantized weights.

    Attributes:
        block: The block in float32 with its original weights; must be left as it was found.
        layers: The problems of its linear layers by name (`nn.Module.get_submodule` names within the block), their
            statistics unseen: those of all experts at once are too large.
        inputs: Outputs of the quantized prefix, (sequences, length, width), on the block's device or the CPU.
        targets: Outputs of the original block on the original stream, (sequences, length, hidden).
        forward: ``forward(block, x)`` with x (batch, length, width) returns the block's output (batch, length, hidden),
            gradients included.
        seed: For batch order; the same seed gives the same result.
        progress: Called with the fraction done, 0 to 1.
        configs: The method's options of layers that do not have those of the others, by name.
    """

    block: nn.Module
    layers: Mapping[str, LayerProblem]
    inputs: Tensor
    targets: Tensor
    forward: Callable[[nn.Module, Tensor], Tensor]
    seed: int = 0
    progress: Callable[[float], None] = lambda _: None
    configs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the block and its layers are."""
        return next(iter(self.layers.values())).weight.device

    def sequences(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of some sequences (batch,), float32 on the block's device."""
        found = (values[index.to(values.device)] for values in (self.inputs, self.targets))
        given, wanted = (values.to(self.device, torch.float32) for values in found)
        relieve()
        return given, wanted
