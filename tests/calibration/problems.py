"""Small layers and blocks with correlated inputs for the tests of the methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankbook.calibration.fitting import rounding
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training.reconstruct import token_errors


def inputs(columns: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Correlated inputs (tokens, columns) whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.rand(columns, generator=generator) * 2 + 0.1
    return (torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns))) * size


def layer(rows: int = 48, columns: int = 128, seed: int = 0, *, heavy: bool = False) -> LayerProblem:
    """A layer (rows, columns) with statistics of `inputs`."""
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    if heavy:
        weight = weight * (1 + 3 * torch.rand(rows, columns, generator=generator) ** 8)
    statistics = LayerStatistics.empty(columns)
    for batch in inputs(columns, seed=seed).split(128):
        statistics.update(batch)
    return LayerProblem("layer", weight, torch.zeros(rows), statistics)


def output_error(problem: LayerProblem, decoded: Tensor) -> float:
    """Energy of the output error relative to the output."""
    gram = problem.statistics.gram
    lost = problem.weight - decoded
    return float(((lost @ gram) * lost).sum() / ((problem.weight @ gram) * problem.weight).sum())


class Block(nn.Module):
    """A residual two-layer block."""

    def __init__(self, width: int = 64, inner: int = 128) -> None:
        super().__init__()
        self.first = nn.Linear(width, inner)
        self.second = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the two layers of it."""
        hidden: Tensor = x + self.second(torch.nn.functional.silu(self.first(x)))
        return hidden


def block(seed: int = 0, sequences: int = 8, length: int = 32) -> BlockProblem:
    """A block problem whose inputs are those of the original stream."""
    torch.manual_seed(seed)
    module = Block()
    x = inputs(64, sequences * length, seed).view(sequences, length, 64)
    statistics = {
        name: LayerStatistics.empty(part.in_features)
        for name, part in module.named_children()
        if isinstance(part, nn.Linear)
    }
    with torch.no_grad():
        statistics["first"].update(x)
        statistics["second"].update(torch.nn.functional.silu(module.first(x)))
        targets = module(x)
    layers = {
        name: LayerProblem(name, part.weight.detach().clone(), part.bias, statistics[name])
        for name, part in (("first", module.first), ("second", module.second))
    }
    return BlockProblem(module, layers, x, targets, lambda part, batch: part(batch))


def block_loss(problem: BlockProblem, records: dict[str, QuantizedLinear]) -> float:
    """Loss of the block's output with decoded weights."""
    weights = {f"{name}.weight": record.weight(with_low_rank=True) for name, record in records.items()}
    with torch.no_grad():
        output = torch.func.functional_call(problem.block, weights, (problem.inputs,))
    return float(token_errors(output, problem.targets).mean())


def reference_affine(weight: Tensor, bits: int, group: int) -> Tensor:
    """Group-wise asymmetric rounding with an integer zero point, as everybody writes it."""
    grouped, top = weight.reshape(-1, group), 2**bits - 1
    low, high = grouped.amin(1, True).clamp(max=0), grouped.amax(1, True).clamp(min=0)
    scale = (high - low) / top
    zero = (-low / scale).round()
    codes = ((grouped / scale).round() + zero).clamp(0, top)
    return (scale * (codes - zero)).view_as(weight)


def grouped(rows: int = 24, columns: int = 128) -> tuple[Tensor, Tensor]:
    problem = layer(rows, columns, heavy=True)
    energy = problem.statistics.second_moment().view(-1, 64)
    return rounding.to_groups(problem.weight, 64), energy
