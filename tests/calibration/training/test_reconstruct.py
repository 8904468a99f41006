"""The block trainer: best state kept, block left as found, same seed same result."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from rankbook.calibration.fitting.problem import BlockProblem
from rankbook.calibration.methods import lcq
from rankbook.calibration.methods.lcq import LcqConfig
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.training import reconstruct
from rankbook.calibration.training.learned_rounding import LearnedRounding, StepSizes
from rankbook.calibration.training.reconstruct import TrainConfig, train_block
from tests.calibration import problems

CONFIG = TrainConfig(steps=10, compute="float32")


def _start(problem: BlockProblem) -> dict[str, QuantizedLinear]:
    return {name: lcq.quantize(part, LcqConfig(feedback_rounds=0)) for name, part in problem.layers.items()}


def _layers(problem: BlockProblem, steps: int = 10) -> dict[str, LearnedRounding]:
    start = _start(problem)
    return {name: LearnedRounding(problem.layers[name].weight, record, steps) for name, record in start.items()}


def test_the_block_is_left_as_it_was_found() -> None:
    problem = problems.block()
    before = dict(problem.block.named_parameters())
    values = {name: value.detach().clone() for name, value in before.items()}
    train_block(problem, _start(problem), _layers(problem), CONFIG)
    after = dict(problem.block.named_parameters())
    assert all(after[name] is before[name] and torch.equal(after[name], values[name]) for name in before)


def test_the_block_is_left_as_it_was_found_when_training_fails() -> None:
    problem = problems.block()
    weight = problem.block.get_submodule("first").weight

    def fail(block: nn.Module, x: Tensor) -> Tensor:
        raise RuntimeError("no forward")

    with pytest.raises(RuntimeError, match="no forward"):
        train_block(dataclasses.replace(problem, forward=fail), _start(problem), _layers(problem), CONFIG)
    assert problem.block.get_submodule("first").weight is weight


def test_same_seed_same_records() -> None:
    first, second = (
        train_block(p, _start(p), _layers(p), CONFIG).records for p in (problems.block(), problems.block())
    )
    for name, record in first.items():
        assert torch.equal(record.codes, second[name].codes)
        assert torch.equal(record.weight(), second[name].weight())


def test_a_start_that_cannot_be_improved_is_returned() -> None:
    problem = problems.block()
    start = _start(problem)
    wild = StepSizes(rounding=400.0, coeffs=50.0, offset=50.0, levels=50.0)
    worse = {name: LearnedRounding(part.weight, start[name], 10, wild) for name, part in problem.layers.items()}
    result = train_block(problem, start, worse, CONFIG)
    assert result.loss_after <= result.loss_before
    assert result.loss_after < result.loss_before or result.records == start


def test_loss_falls_and_is_that_of_the_stored_records() -> None:
    problem = problems.block()
    result = train_block(problem, _start(problem), _layers(problem, 40), TrainConfig(steps=40, compute="float32"))
    assert result.loss_after < 0.9 * result.loss_before
    weights = {f"{name}.weight": record.weight() for name, record in result.records.items()}
    with torch.no_grad():
        output = torch.func.functional_call(problem.block, weights, (problem.inputs,))
    errors = (output - problem.targets).square().mean(-1) / problem.targets.square().mean(-1)
    # The floor under the energies is a thousandth of their median.
    assert float(errors.mean()) == pytest.approx(result.loss_after, rel=1e-2)


def test_a_token_with_a_huge_output_does_not_own_the_loss() -> None:
    target = torch.randn(2, 8, 64)
    target[:, 0] *= 1000
    errors = reconstruct.token_errors(target * 1.01, target)
    torch.testing.assert_close(errors, torch.full((2, 8), 1e-4), rtol=0.02, atol=0)


def test_bfloat16_training_helps_too() -> None:
    problem = problems.block()
    result = train_block(problem, _start(problem), _layers(problem, 40), TrainConfig(steps=40, compute="bfloat16"))
    assert result.loss_after < result.loss_before


def test_progress_reaches_one() -> None:
    seen: list[float] = []
    problem = dataclasses.replace(problems.block(), progress=seen.append)
    train_block(problem, _start(problem), _layers(problem), CONFIG)
    assert seen == sorted(seen)
    assert seen[-1] == 1


class _Fixed:
    """A trainable layer that nothing moves."""

    def __init__(self, record: QuantizedLinear) -> None:
        self._record = record

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._record.weight().to(dtype)

    def update(self, grad: Tensor, fraction: float) -> None:
        assert grad.shape == self._record.codes.shape

    def record(self) -> QuantizedLinear:
        return self._record


def test_any_layer_with_the_three_calls_can_be_trained() -> None:
    problem = problems.block()
    start = _start(problem)
    result = train_block(problem, start, {name: _Fixed(record) for name, record in start.items()}, CONFIG)
    assert result.loss_after == result.loss_before


def test_wrong_values_are_refused() -> None:
    problem = problems.block()
    with pytest.raises(ValueError, match="auto, float32, bfloat16"):
        train_block(problem, {}, {}, TrainConfig(compute="half"))
    with pytest.raises(ValueError, match="must agree"):
        train_block(dataclasses.replace(problem, targets=problem.targets[:1]), {}, {}, CONFIG)
    empty = dataclasses.replace(problem, inputs=problem.inputs[:0], targets=problem.targets[:0])
    with pytest.raises(ValueError, match="at least one"):
        train_block(empty, {}, {}, CONFIG)
    with pytest.raises(ValueError, match="at least 1"):
        train_block(problem, {}, {}, TrainConfig(steps=0))


def test_streams_in_fp16_are_judged_in_float32() -> None:
    """Squares of fp16 values above 256 are beyond fp16: without widening, their tokens count for nothing."""
    problem = problems.block()
    targets = (problem.targets * (1000 / problem.targets.abs().max())).half()
    half = dataclasses.replace(problem, inputs=problem.inputs.half(), targets=targets)
    wide = dataclasses.replace(half, inputs=half.inputs.float(), targets=half.targets.float())
    losses = [
        train_block(p, _start(p), _layers(p, 1), dataclasses.replace(CONFIG, steps=1)).loss_before for p in (half, wide)
    ]
    assert losses[0] == losses[1]
