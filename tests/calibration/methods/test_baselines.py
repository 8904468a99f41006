"""GPTQ, OmniQuant, AWQ and SmoothQuant on the same record and pipeline (the scaling itself: test_scaling)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rankbook.calibration.methods import METHODS, awq, gptq, omniquant, rtn, smoothquant
from rankbook.calibration.methods.omniquant import OmniQuantConfig
from rankbook.calibration.training.trained_codebooks import TrainedCodebooks
from tests.calibration import problems
from tests.calibration.problems import block_loss

TRAINED = OmniQuantConfig(bits=3, steps=40, compute="float32")


@pytest.mark.parametrize("weight_format", ["affine", "symmetric", "nf4"])
def test_gptq_rounds_better_than_to_nearest_on_the_same_grid(weight_format: str) -> None:
    problem = problems.layer(40, 128)
    config = gptq.GptqConfig(bits=4, format=weight_format)
    record = gptq.quantize(problem, config)
    plain = rtn.quantize(problem, rtn.RtnConfig(bits=4, format=weight_format))
    assert torch.equal(record.params.dense(), plain.params.dense())
    assert problems.output_error(problem, record.weight()) < 0.8 * problems.output_error(problem, plain.weight())
    assert record.method == "gptq"


def test_gptq_takes_columns_as_they_stand_or_by_energy() -> None:
    problem = problems.layer(40, 128)
    config = gptq.GptqConfig(bits=3)
    ordered = gptq.quantize(problem, config)
    plain = gptq.quantize(problem, dataclasses.replace(config, act_order=False))
    assert not torch.equal(ordered.codes, plain.codes)
    # With columns as they stand the first one is rounded to its nearest level.
    first = rtn.quantize(problem, rtn.RtnConfig(bits=3)).codes[:, 0]
    assert torch.equal(plain.codes[:, 0], first)


def test_learned_clipping_starts_at_the_record() -> None:
    problem = problems.layer(40, 128)
    record = rtn.quantize(problem, TRAINED)
    layer = TrainedCodebooks(problem.weight, record, "straight-through", 1e-2)
    again = layer.record()
    assert torch.equal(again.levels, record.levels)
    # A range beyond 1.5 times the weights would be cut, and 8-bit parameters are rounded again: a step of a 255th.
    torch.testing.assert_close(again.params.dense(), record.params.dense(), rtol=0.02, atol=2e-3)
    assert float((again.codes != record.codes).float().mean()) < 0.03


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_learned_clipping_moves_ranges_alone(bits: int) -> None:
    problem = problems.block()
    config = dataclasses.replace(TRAINED, bits=bits, clip_search=False, param_bits=16)
    records = {name: rtn.quantize(part, config) for name, part in problem.layers.items()}
    trained = omniquant.refine(problem, records, config)
    before, after = block_loss(problem, records), block_loss(problem, trained)
    assert after <= before if bits == 8 else after < 0.9 * before
    for name, record in trained.items():
        assert torch.equal(record.levels, records[name].levels)
        assert record.method == "omniquant"
        if bits < 8:  # codes are the nearest levels: nothing steers them
            again = record.codebooks().gather(2, record.codes.view(len(record.codes), -1, 64).long())
            weight = problem.layers[name].weight.view_as(again)
            nearest = (weight[..., None] - record.codebooks()[:, :, None]).abs().amin(-1)
            torch.testing.assert_close((weight - again).abs(), nearest, rtol=1e-4, atol=1e-6)


def test_fast_effort_trains_nothing() -> None:
    problem = problems.block()
    config = OmniQuantConfig(bits=3, effort="fast")
    records = {name: rtn.quantize(part, config) for name, part in problem.layers.items()}
    assert omniquant.refine(problem, records, config) == records


def test_methods_with_input_scaling_round_to_nearest() -> None:
    problem = problems.layer(40, 128)
    for name, config in (("awq", awq.AwqConfig(bits=3)), ("smoothquant", smoothquant.SmoothQuantConfig())):
        record = METHODS[name].quantize(problem, config)
        assert record.method == METHODS[name].scale_inputs == name
        assert torch.equal(record.codes, rtn.quantize(problem, config).codes)
    assert not rtn.quantize(problem, smoothquant.SmoothQuantConfig()).has_offset


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="leave it at affine"):
        OmniQuantConfig(format="symmetric")
    with pytest.raises(ValueError, match="choose one of fast, default, high"):
        OmniQuantConfig(effort="max")
