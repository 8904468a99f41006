"""Rounding to nearest: the formats against their definitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods.rtn import RtnConfig, quantize
from rankbook.calibration.record.quantized_linear import GroupParams, QuantizedLinear
from tests.calibration import problems
from tests.calibration.problems import reference_affine


def _problem(weight: Tensor) -> LayerProblem:
    return LayerProblem("layer", weight, None, LayerStatistics.empty(weight.shape[1]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_is_asymmetric_rounding_with_an_integer_zero(bits: int) -> None:
    problem = problems.layer(40, 128)
    record = quantize(problem, RtnConfig(bits=bits, param_bits=32))
    wanted = reference_affine(problem.weight, bits, 64)
    # Equal up to a weight on a boundary, which may go either way by one ulp of the quotient.
    differing = (record.weight() - wanted).abs() > 1e-6
    assert float(differing.float().mean()) < 1e-3


def test_zero_stays_next_to_zero_with_eight_bit_parameters() -> None:
    weight = problems.layer(64, 128).weight.clone()
    weight[:, ::7] = 0
    record = quantize(_problem(weight), RtnConfig(bits=3))
    step = (weight.amax() - weight.amin()) / 7
    assert float(record.weight()[weight == 0].abs().max()) < 0.05 * float(step)


@pytest.mark.parametrize(("weight_format", "bits"), [("affine", 3), ("symmetric", 3), ("nf4", 4), ("mxint", 3)])
def test_clipping_search_never_loses(weight_format: str, bits: int) -> None:
    problem = problems.layer(48, 128, heavy=True)
    energy = problem.statistics.second_moment()
    config = RtnConfig(bits=bits, format=weight_format, param_bits=32)
    plain = quantize(problem, config).weight()
    searched = quantize(problem, dataclasses.replace(config, clip_search=True)).weight()
    lost = [float(((w - problem.weight).square() * energy).sum()) for w in (plain, searched)]
    # mxint may not gain (its exponent already fits); float noise of the sums is far below 0.1 %.
    assert lost[1] <= lost[0] * 1.001


def test_nf4_takes_the_nearest_level_of_the_largest_magnitude() -> None:
    weight = torch.randn(8, 64)
    record = quantize(_problem(weight), RtnConfig(bits=4, format="nf4", level_dtype="float16", param_bits=32))
    peak = weight.abs().amax(1, True)
    levels = record.levels.float()[0]
    wanted = levels[(weight / peak)[..., None].sub(levels).abs().argmin(-1)] * peak
    torch.testing.assert_close(record.weight(), wanted, rtol=1e-5, atol=1e-6)


def reference_mxint(weight: Tensor, width: int, block: int) -> Tensor:
    """The official code's block floating point (without its epsilons)."""
    grouped, mantissa = weight.reshape(-1, block), width - 1
    exponent = grouped.abs().amax(1, True).log2().ceil()
    codes = (grouped.abs() / exponent.exp2() * 2**mantissa).round().clamp(0, 2**mantissa - 1)
    return (grouped.sign() * exponent.exp2() * codes / 2**mantissa).view_as(weight)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([16, 32]), st.integers(0, 1000), st.sampled_from([8, 16]))
def test_mxint_is_block_floating_point(width: int, block: int, seed: int, param_bits: int) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(seed)) * 0.05
    record = quantize(_problem(weight), RtnConfig(bits=width, group_size=block, format="mxint", param_bits=param_bits))
    wanted = reference_mxint(weight, width, block)
    # A tie goes down here and to even there.
    ties = ((weight - wanted).abs() - (weight - record.weight()).abs()).abs() < 1e-7
    assert bool((torch.isclose(record.weight(), wanted, rtol=0, atol=1e-9) | ties).all())


def test_mxint_error_bound_and_idempotence() -> None:
    weight = torch.randn(32, 64) * 0.05
    config = RtnConfig(bits=4, group_size=16, format="mxint")
    once = quantize(_problem(weight), config).weight()
    exponent = weight.reshape(-1, 16).abs().amax(1, True).log2().ceil()
    error, half = (once - weight).reshape(-1, 16).abs(), (exponent - 4).exp2()
    saturated = weight.reshape(-1, 16).abs() > exponent.exp2() * (7 / 8)
    assert bool((error <= torch.where(saturated, 2 * half, half) * (1 + 1e-6)).all())
    twice = quantize(_problem(once), config).weight()
    peak = once.reshape(-1, 16).abs().amax(1)
    moved = (twice - once).reshape(-1, 16).abs().amax(1) > 0
    assert not bool((moved & (peak.log2() % 1 != 0)).any())


def test_two_bit_mxint_halves_what_is_ternary_already() -> None:
    weight = torch.randn(32, 64) * 0.05
    config = RtnConfig(bits=2, group_size=16, format="mxint")
    once = quantize(_problem(weight), config).weight()
    assert torch.equal(quantize(_problem(once), config).weight(), once / 2)


@pytest.mark.parametrize("param_bits", [8, 16])
def test_powers_of_two_are_exact(param_bits: int) -> None:
    exponents = torch.randint(-9, -1, (70, 4, 1))
    params = GroupParams.powers_of_two(exponents, param_bits)
    assert torch.equal(params.dense(), exponents.float().exp2())


def test_powers_of_two_raise_what_lies_deeper_than_seven_octaves() -> None:
    exponents = torch.zeros(32, 2, 1)
    exponents[0] = -20
    assert GroupParams.powers_of_two(exponents).dense()[0].tolist() == [[2.0**-7], [2.0**-7]]
    assert GroupParams.powers_of_two(exponents, 16).dense()[0].tolist() == [[2.0**-20], [2.0**-20]]


@pytest.mark.parametrize("weight_format", ["affine", "symmetric", "mxint"])
def test_packing_keeps_the_weight(weight_format: str) -> None:
    problem = problems.layer(37, 96)
    record = quantize(problem, RtnConfig(bits=3, group_size=32, format=weight_format))
    again = QuantizedLinear.unpack(record.pack(), record.spec())
    assert torch.equal(again.weight(), record.weight())


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of 16, 32, 48, 96"):
        quantize(problems.layer(8, 96), RtnConfig(group_size=64))
    with pytest.raises(ValueError, match="weights of layer hold NaN"):
        quantize(_problem(torch.full((8, 64), float("nan"))), RtnConfig())
    with pytest.raises(ValueError, match="choose 8 or 16"):
        RtnConfig(param_bits=4)
    with pytest.raises(ValueError, match="choose one of int8, float16"):
        RtnConfig(level_dtype="float64")


@pytest.mark.parametrize("weight_format", ["affine", "symmetric", "mxint"])
def test_a_layer_of_zeros_stays_zero(weight_format: str) -> None:
    record = quantize(_problem(torch.zeros(8, 64)), RtnConfig(bits=3, format=weight_format))
    assert float(record.weight().abs().max()) < 1e-6
