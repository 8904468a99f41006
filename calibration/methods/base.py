"""What a method is given and what it must return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankbook.calibration.record import QuantizedLinear
from rankbook.calibration.statistics import LayerStatistics


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


@dataclass(frozen=True)
class BlockProblem:
    """One transformer block whose output is to be reproduced with quantized weights.

    Attributes:
        block: The block in float32 with its original weights; must be left as it was found.
        layers: The problems of its linear layers by name (`nn.Module.get_submodule` names within the block).
        inputs: Outputs of the quantized prefix, (sequences, length, hidden).
        targets: Outputs of the original block on the original stream, the same shape.
        forward: ``forward(block, x)`` with x (batch, length, hidden) returns the block's output, gradients included.
        seed: For batch order; the same seed gives the same result.
        progress: Called with the fraction done, 0 to 1.
    """

    block: nn.Module
    layers: Mapping[str, LayerProblem]
    inputs: Tensor
    targets: Tensor
    forward: Callable[[nn.Module, Tensor], Tensor]
    seed: int = 0
    progress: Callable[[float], None] = lambda _: None


@dataclass(frozen=True)
class Method:
    """A quantization method: one module in this package that ends in ``METHOD = Method(...)``.

    Attributes:
        name: What ``--method`` takes.
        config_type: Frozen dataclass of its options; every field has a default.
        quantize: ``quantize(problem, config)`` solves one layer in closed form.
        refine: ``refine(problem, records, config)`` improves the records of a whole block by its output, or None
            where the method has no such stage. It is given what ``quantize`` returned (with error branches, if any).
        trains: Whether ``refine`` does anything with this config; without, no stream of targets is computed.
        scale_inputs: Input scaling that belongs to the method (see `rankbook.calibration.scaling`).
        feedback: Whether codes are chosen with error feedback, so that the errors of a layer are not independent.
        rank_is_stored: Whether its option ``rank`` is the number of planes in the record, which costs stored bits.
    """

    name: str
    config_type: type
    quantize: Callable[[LayerProblem, Any], QuantizedLinear]
    refine: Callable[[BlockProblem, Mapping[str, QuantizedLinear], Any], dict[str, QuantizedLinear]] | None = None
    trains: Callable[[Any], bool] = lambda _: True
    scale_inputs: str = "none"
    feedback: bool = False
    rank_is_stored: bool = False
