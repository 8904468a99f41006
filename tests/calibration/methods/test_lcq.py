"""LCQ: the algebra of the codebooks, both gradients, storage and training (notes on LCQ, 1.11)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rankbook.calibration.fitting import codebook_fit, rounding
from rankbook.calibration.fitting.codebook_fit import Codebooks
from rankbook.calibration.methods import lcq
from rankbook.calibration.methods.lcq import LcqConfig
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from tests.calibration import problems
from tests.calibration.problems import block_loss, reference_affine

FAST = LcqConfig(effort="fast")


def test_rank_one_with_uniform_levels_is_asymmetric_rounding() -> None:
    weight = problems.layer(24, 128).weight
    grouped = rounding.to_groups(weight, 64)
    low, high = grouped.amin(1).clamp_max(0), grouped.amax(1).clamp_min(0)
    step = (high - low) / 7
    books = Codebooks(torch.arange(8.0)[None], step[None], -step * (-low / step).round())
    decoded = rounding.lookup(books.dense(), rounding.nearest(grouped, books.dense()))
    torch.testing.assert_close(rounding.from_groups(decoded), reference_affine(weight, 3, 64), rtol=1e-6, atol=1e-7)


def test_a_second_plane_without_coefficients_changes_nothing() -> None:
    grouped, energy = problems.grouped()
    one = codebook_fit.fit(grouped, energy, 1, 8, 4)
    two = Codebooks(torch.cat([one.levels, torch.randn(1, 8)]), torch.cat([one.coeffs, 0 * one.coeffs]), one.offset)
    assert torch.equal(two.dense(), one.dense())


@pytest.mark.parametrize(("bits", "rank"), [(2, 1), (2, 3), (3, 2), (4, 2), (8, 1)])
def test_the_closed_form_beats_rounding(bits: int, rank: int) -> None:
    problem = problems.layer(40, 128)
    record = lcq.quantize(problem, dataclasses.replace(FAST, bits=bits, rank=rank, param_bits=16))
    plain = reference_affine(problem.weight, bits, 64)
    # At 8 bits the levels themselves are rounded to integers, so little can be gained.
    bound = 0.5 if bits < 8 else 2
    assert problems.output_error(problem, record.weight()) < bound * problems.output_error(problem, plain)


def test_feedback_and_float_levels_help() -> None:
    problem = problems.layer(40, 128)

    def lost(**changes: Any) -> float:
        return problems.output_error(problem, lcq.quantize(problem, dataclasses.replace(FAST, **changes)).weight())

    assert lost() < 0.8 * lost(feedback_rounds=0)
    # Integer levels cost at most a few percent of the error (kernel notes, section 0).
    assert lost() < 1.05 * lost(level_dtype="float16", param_bits=16)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_planes_are_those_asked_for_however_few_the_rounds(rounds: int) -> None:
    problem, one = problems.layer(40, 128), dataclasses.replace(FAST, bits=3, rank=1, fit_rounds=rounds)
    three = lcq.quantize(problem, dataclasses.replace(one, rank=3))
    assert three.planes == 3
    lost = problems.output_error(problem, three.weight())
    assert lost < 0.95 * problems.output_error(problem, lcq.quantize(problem, one).weight())


def test_packing_keeps_the_weight_and_the_size_is_the_formula() -> None:
    problem = problems.layer(96, 256)
    record = lcq.quantize(problem, FAST)
    again = QuantizedLinear.unpack(record.pack(), record.spec())
    assert torch.equal(again.weight(), record.weight())
    # Codes, 3 numbers of 8 bits per group of 64, step and base (float32) per panel of 32 rows and plane, 2 x 8 levels.
    formula = 3 + 3 * 8 / 64 + 3 * 64 / (32 * 256) + 2 * 8 * 8 / (96 * 256)
    assert record.bits_per_weight() == pytest.approx(formula, rel=1e-9)


def test_eight_bit_parameters_cost_little() -> None:
    problem = problems.layer(64, 256)
    exact = lcq.quantize(problem, dataclasses.replace(FAST, param_bits=16))
    small = lcq.quantize(problem, FAST)
    assert problems.output_error(problem, small.weight()) < 1.05 * problems.output_error(problem, exact.weight())


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": "rounding"},
        {"recipe": "rounding", "rank": 1, "bits": 2},
        {"recipe": "rounding", "level_dtype": "float16", "param_bits": 16},
        {"recipe": "codebook", "gradient": "straight-through"},
        {"recipe": "codebook", "gradient": "assignment", "rank": 3},
    ],
    ids=str,
)
def test_training_never_leaves_a_block_worse(changes: dict[str, Any]) -> None:
    problem = problems.block()
    config = dataclasses.replace(LcqConfig(steps=40, compute="float32", feedback_rounds=0), **changes)
    records = {name: lcq.quantize(part, config) for name, part in problem.layers.items()}
    trained = lcq.refine(problem, records, config)
    before, after = (block_loss(problem, found) for found in (records, trained))
    # The trainer returns the start where nothing was gained; learned rounding always gains here.
    assert after < before if config.recipe == "rounding" else after <= before
    for record in trained.values():
        assert record.levels.dtype == (torch.int8 if config.level_dtype == "int8" else torch.float16)
        assert (record.params.codes is not None) == (config.param_bits == 8)


def test_training_around_an_error_branch_keeps_the_branch() -> None:
    from rankbook.calibration.fitting.error_branch import fit_error_branch

    problem = problems.block()
    config = LcqConfig(steps=40, compute="float32")
    records = {}
    for name, part in problem.layers.items():
        record = lcq.quantize(part, config)
        records[name] = record.with_low_rank(fit_error_branch(part, record, "qera", 4))
    trained = lcq.refine(problem, records, config)
    assert block_loss(problem, trained) <= block_loss(problem, records)
    assert all(trained[name].low_rank is records[name].low_rank for name in records)


def test_fast_effort_trains_nothing() -> None:
    problem = problems.block()
    records = {name: lcq.quantize(part, FAST) for name, part in problem.layers.items()}
    assert lcq.refine(problem, records, FAST) == records


def test_without_statistics_the_weights_are_fitted() -> None:
    problem = problems.layer(16, 64)
    blind = dataclasses.replace(problem, statistics=type(problem.statistics).empty(64))
    record = lcq.quantize(blind, dataclasses.replace(FAST, rank=1))
    lost = (record.weight() - problem.weight).square().mean() / problem.weight.square().mean()
    assert float(lost) < 0.04


@pytest.mark.parametrize(("value", "bits"), [(0.0, 3), (0.5, 2), (-1.0, 3)])
def test_constant_weights_survive(value: float, bits: int) -> None:
    problem = dataclasses.replace(problems.layer(8, 64), weight=torch.full((8, 64), value))
    record = lcq.quantize(problem, dataclasses.replace(FAST, bits=bits))
    torch.testing.assert_close(record.weight(), problem.weight, rtol=1e-3, atol=1e-4)


def test_one_group_per_row() -> None:
    problem = problems.layer(20, 144)
    record = lcq.quantize(problem, dataclasses.replace(FAST, group_size=144))
    assert record.params.shape == (20, 1, 3)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="choose 1 to 3"):
        LcqConfig(bits=2, rank=4)
    with pytest.raises(ValueError, match="choose one of rounding, codebook"):
        LcqConfig(recipe="adam")
    with pytest.raises(ValueError, match="choose one of fast, default, high"):
        LcqConfig(effort="max")
    with pytest.raises(ValueError, match="choose 8 or 16"):
        LcqConfig(param_bits=4)
    with pytest.raises(ValueError, match="effort fast trains nothing"):
        LcqConfig(effort="fast", steps=50)
    with pytest.raises(ValueError, match="fit_rounds is 0; give at least 1"):
        LcqConfig(fit_rounds=0)
    problem = problems.layer(8, 64)
    with pytest.raises(ValueError, match="weights of layer hold NaN"):
        lcq.quantize(dataclasses.replace(problem, weight=torch.full((8, 64), float("nan"))), FAST)
    problem.statistics.gram.fill_(float("inf"))
    with pytest.raises(ValueError, match="input statistics of layer hold NaN"):
        lcq.quantize(problem, FAST)
