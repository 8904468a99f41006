"""A method for the driver's tests: min-max rounding, and a training stage that only checks what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods import Method
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear


@dataclass(frozen=True)
class ToyConfig:
    """Options."""

    bits: int = field(default=3, metadata={"help": "Bits."})
    group_size: int = field(default=64, metadata={"help": "Group."})


def quantize(problem: LayerProblem, config: ToyConfig) -> QuantizedLinear:
    """Round min to max."""
    rows, columns = problem.weight.shape
    grouped = problem.weight.view(rows, -1, config.group_size)
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = ((high - low) / ((1 << config.bits) - 1)).clamp_min(1e-8)
    codes = ((grouped - low) / step).round().to(torch.uint8)
    levels = torch.arange(1 << config.bits)[None]
    levels = (levels - 128 if config.bits == 8 else levels).to(torch.int8)
    offset = low + 128 * step if config.bits == 8 else low
    params = GroupParams.quantize(torch.cat([step, offset], 2), 16)
    return QuantizedLinear(codes.view(rows, columns), config.bits, levels, params, True, problem.bias, method="toy")


def refine(
    problem: BlockProblem, records: Mapping[str, QuantizedLinear], config: ToyConfig
) -> dict[str, QuantizedLinear]:
    """Take one random step that depends on the seed, after checking shapes and that gradients flow."""
    x = problem.inputs[:2].float().requires_grad_()
    output = problem.forward(problem.block, x)
    if output.shape != problem.targets[:2].shape:
        raise ValueError(f"block gives {tuple(output.shape)}, targets are {tuple(problem.targets[:2].shape)}")
    (gradient,) = torch.autograd.grad(output.square().sum(), x)
    if not gradient.abs().sum() > 0:
        raise ValueError("no gradient reaches the inputs")
    problem.progress(0.5)
    noise = torch.rand(1)
    return {
        name: replace(record, params=GroupParams(values=record.params.values * (1 + noise.half() / 1000)))
        for name, record in records.items()
        if record.params.values is not None
    }


TOY = Method("toy", ToyConfig, quantize)
TRAINED_TOY = Method("trained-toy", ToyConfig, quantize, refine)
