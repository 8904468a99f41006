"""Training quantized layers by the output of their transformer block.

``min || F(X~; W_hat) - F(X; W) ||^2``, relative for each token, over whatever the layers can move: X~ is the stream
through the quantized prefix, the target is the original block on the original stream (LCQ, Cai et al. 2024; BRECQ, Li
et al. 2021). The steps are sign gradient descent with linearly falling step size (AutoRound, Cheng et al. 2023,
section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.option import Options, option
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.settings import EFFORTS
from rankbook.calibration.threads import SMALL, Workers, workers

LOSSES = ("relative", "square")
"""Error of a block's output: relative for each token (see `token_errors`), or the plain square, summed over tokens."""

COMPUTE = ("auto", "float32", "bfloat16")
"""Arithmetic of the block's forward and backward pass; ``auto`` takes bfloat16 where the processor multiplies it
natively.
"""


STEPS = {"fast": 0, "default": 100, "high": 600}
"""Training steps per block of each effort."""


@dataclass(frozen=True)
class TrainingOptions(Options):
    """Options of every method that trains blocks."""

    effort: str = option("default", "fast: no training; default, high: trained by block", choices=EFFORTS)
    steps: int = option(0, "training steps per block; 0: as many as the effort says", least=0)
    batch: int = option(1, "calibration sequences per training step", least=1)
    compute: str = option("auto", "arithmetic of training", choices=COMPUTE)

    def training_steps(self) -> int:
        """Return the training steps per block."""
        return self.steps or STEPS[self.effort]

    def trains(self) -> bool:
        """Return whether blocks are trained."""
        return self.training_steps() > 0

    def train_config(self) -> TrainConfig:
        """Return how blocks are trained."""
        return TrainConfig(self.training_steps(), self.batch, self.compute)


_CPU = torch.device("cpu")
Result = TypeVar("Result")


class TrainableLayer(Protocol):
    """A quantized layer that can be moved by the gradient of its decoded weight."""

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded weight (N, K) of the present state in ``dtype``, error branch included."""

    def update(self, grad: Tensor, fraction: float) -> None:
        """Take one step. ``grad`` is dL/dW_hat (N, K), ``fraction`` the share of the step size left, 1 down to 0."""

    def record(self) -> QuantizedLinear:
        """Return the present state as it is stored; its weight is what `weight` returns."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and with what a block is trained.

    Attributes:
        steps: Gradient steps.
        batch: Sequences per step.
        compute: One of `COMPUTE`.
        judge: Sequences on which states are compared.
        checks: Comparisons during training, the last one at the end.
        loss: One of `LOSSES`.
    """

    steps: int = 100
    batch: int = 1
    compute: str = "auto"
    judge: int = 8
    checks: int = 2
    loss: str = "relative"


@dataclass(frozen=True)
class TrainResult:
    """Records of the best state, and the block loss before and after."""

    records: dict[str, QuantizedLinear]
    loss_before: float
    loss_after: float


def train_records(
    problem: BlockProblem,
    records: Mapping[str, QuantizedLinear],
    options: TrainingOptions,
    layer: Callable[[LayerProblem, QuantizedLinear], TrainableLayer],
) -> dict[str, QuantizedLinear]:
    """Train the records of a block by its output; where the options do not train they are returned as they are.

    Error branches stay as they are; what is trained is trained around them.

    Args:
        problem: The block.
        records: Where training starts.
        options: Whether and how long.
        layer: Makes what is trained of a layer and its record; called in the order of the records.
    """
    if not options.trains() or not records:
        return dict(records)
    layers = {name: layer(problem.layers[name], record) for name, record in records.items()}
    return train_block(problem, records, layers, options.train_config()).records


def train_block(
    problem: BlockProblem,
    start: Mapping[str, QuantizedLinear],
    layers: Mapping[str, TrainableLayer],
    config: TrainConfig,
) -> TrainResult:
    """Train the layers of one block and return the best state seen, the start included.

    The block is left as it was found, whatever happens.

    Args:
        problem: The block.
        start: Records to beat; they are returned if training gains nothing.
        layers: Trainable layers by the same names.
        config: Budget.

    Raises:
        ValueError: Unknown ``compute``, or inputs and targets that do not fit each other.
    """
    _check(problem, config)
    judged = _judge_batches(len(problem.inputs), config)
    check_at = {round(config.steps * (i + 1) / config.checks) for i in range(config.checks)}
    best = dict(start)
    batches = _batches(len(problem.inputs), config, problem.seed)
    largest_first = sorted(layers, key=lambda name: -problem.layers[name].weight.numel())
    with workers(problem.device) as at_once:
        before = best_loss = _loss(problem, best, at_once, judged, config)
        for step in range(config.steps):
            _step(problem, {name: layers[name] for name in largest_first}, at_once, next(batches), config, step)
            if step + 1 in check_at:
                state = _of_each(problem, layers, at_once, lambda name: layers[name].record())
                loss = _loss(problem, state, at_once, judged, config)
                if loss < best_loss:
                    best_loss, best = loss, state
            problem.progress((step + 1) / config.steps)
    return TrainResult(best, before, best_loss)


def compute_dtype(compute: str, device: torch.device = _CPU) -> torch.dtype:
    """Resolve one of `COMPUTE` on a device.

    Raises:
        ValueError: Unknown name.
    """
    if compute not in COMPUTE:
        raise ValueError(f"compute {compute!r} is unknown; choose one of {', '.join(COMPUTE)}")
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == _CPU:
        native = bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if compute == "bfloat16" or (compute == "auto" and native) else torch.float32


def token_errors(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error of each token (batch, length) relative to the energy of its target.

    What follows a block normalizes each token, so relative errors count; and the few tokens with huge outputs
    (attention sinks) would otherwise own the loss: 42 % of it in one block of SmolLM2-135M. Measured there over five
    blocks: 12 % less loss of log-perplexity than the plain mean square.
    """
    energy = target.square().mean(-1)
    floor = 1e-3 * energy.median() + torch.finfo(torch.float32).tiny
    return (output.float() - target).square().mean(-1) / (energy + floor)


def square_errors(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean square error of each token (batch, length) times the length (the loss of LRQ's released code)."""
    return (output.float() - target).square().mean(-1) * target.shape[-2]


_ERRORS = {"relative": token_errors, "square": square_errors}


def _check(problem: BlockProblem, config: TrainConfig) -> None:
    if problem.inputs.shape[:2] != problem.targets.shape[:2]:
        raise ValueError(f"inputs {tuple(problem.inputs.shape)} and targets {tuple(problem.targets.shape)} must agree")
    if len(problem.inputs) == 0:
        raise ValueError("training needs at least one calibration sequence; none was given")
    compute_dtype(config.compute)
    if config.loss not in LOSSES:
        raise ValueError(f"loss {config.loss!r} is unknown; choose one of {', '.join(LOSSES)}")
    if config.steps < 1 or config.batch < 1 or config.checks < 1:
        raise ValueError("steps, batch and checks must be at least 1")


def _batches(count: int, config: TrainConfig, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of sequence numbers, every sequence once per pass."""
    generator = torch.Generator().manual_seed(seed)
    size = min(config.batch, count)
    while True:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _judge_batches(count: int, config: TrainConfig) -> Sequence[Tensor]:
    """Evenly spaced sequences for comparing states, in batches."""
    chosen = torch.linspace(0, count - 1, min(config.judge, count)).round().long()
    return torch.split(chosen, max(1, config.batch))


def arithmetic(dtype: torch.dtype, device: torch.device = _CPU) -> AbstractContextManager[object]:
    """Return a context in which matrix products on a device are computed in ``dtype`` (see `compute_dtype`)."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def swapped_weights(block: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put other weights into the named linear layers of a block, and the old ones back afterwards."""
    modules = {name: block.get_submodule(name) for name in weights}
    kept = {name: module._parameters["weight"] for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module._parameters["weight"] = weights[name]
        yield
    finally:
        for name, module in modules.items():
            module._parameters["weight"] = kept[name]


def _step(
    problem: BlockProblem,
    layers: Mapping[str, TrainableLayer],
    at_once: Workers,
    batch: Tensor,
    config: TrainConfig,
    step: int,
) -> None:
    """Move every layer by the gradient of a batch."""
    dtype, left = compute_dtype(config.compute, problem.device), 1 - step / config.steps

    def decoded(name: str) -> nn.Parameter:
        return nn.Parameter(layers[name].weight(dtype))

    grads = _gradients(problem, _of_each(problem, layers, at_once, decoded), batch, config)
    _of_each(problem, layers, at_once, lambda name: layers[name].update(grads.pop(name), left))


def _of_each(
    problem: BlockProblem, names: Iterable[str], at_once: Workers, function: Callable[[str], Result]
) -> dict[str, Result]:
    """Return what a function gives for each layer by its name; small ones are worked on at once."""
    order = list(names)
    found = at_once.map(function, order, lambda name: problem.layers[name].weight.numel() <= SMALL)
    return dict(zip(order, found, strict=True))


def _gradients(
    problem: BlockProblem, weights: Mapping[str, nn.Parameter], batch: Tensor, config: TrainConfig
) -> dict[str, Tensor]:
    dtype = compute_dtype(config.compute, problem.device)
    inputs, targets = problem.sequences(batch)
    with swapped_weights(problem.block, weights), torch.enable_grad(), arithmetic(dtype, problem.device):
        output = problem.forward(problem.block, inputs)
        loss = _ERRORS[config.loss](output, targets).mean()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
        name: torch.zeros_like(weight) if grad is None else grad
        for (name, weight), grad in zip(weights.items(), found, strict=True)
    }


@torch.no_grad()
def _loss(
    problem: BlockProblem,
    records: Mapping[str, QuantizedLinear],
    at_once: Workers,
    batches: Sequence[Tensor],
    config: TrainConfig,
) -> float:
    dtype = compute_dtype(config.compute, problem.device)

    def decoded(name: str) -> nn.Parameter:
        return nn.Parameter(records[name].weight(with_low_rank=True).to(dtype), requires_grad=False)

    weights = _of_each(problem, records, at_once, decoded)
    total = 0.0
    with swapped_weights(problem.block, weights), arithmetic(dtype, problem.device):
        for batch in batches:
            inputs, targets = problem.sequences(batch)
            total += float(_ERRORS[config.loss](problem.forward(problem.block, inputs), targets).sum())
    return total / max(1, sum(len(batch) for batch in batches) * problem.inputs.shape[1])
