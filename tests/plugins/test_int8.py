"""The definition of the int8 mode: its roundings are what it says, and it stays near the exact product."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankbook.plugins import int8
from tests.ops.cases import WIDE

floats = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40, allow_subnormal=False)


def nearest_float32(value: Fraction) -> np.float32:
    """Round an exact value to float32, ties to even, without another rounding on the way."""
    guess = np.float32(float(value))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    near = min(around, key=lambda one: (abs(Fraction(float(one)) - value), int(one.view(np.int32)) & 1))
    return np.float32(near)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(a=floats, b=floats, c=floats)
def test_fused_rounds_once(a: float, b: float, c: float) -> None:
    """Compared with rational arithmetic, which does not round at all."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = int8.fused(*(np.array([value], np.float32) for value in (a, b, c)))[0]
    if abs(exact) > Fraction(2) ** -100 or exact == 0:
        assert got == nearest_float32(exact)


def test_fused_where_two_roundings_differ() -> None:
    """The exact value lies 2**-60 below the middle of two floats; rounded to float64 first, it would be the middle."""
    a, b, c = np.array([[2**-12 * (1 + 2**-18)], [2**-12 * (1 - 2**-18)], [1 + 2**-23]], np.float32)
    assert np.float32(float(a[0]) * float(b[0]) + float(c[0])) == np.float32(1 + 2**-22)
    assert int8.fused(a, b, c)[0] == np.float32(1 + 2**-23)


def test_quantize() -> None:
    """The largest value becomes 127, halves go to even, errors are below half a step; the scale gives values back."""
    rows = np.array([[127, -127, 0.5, 1.5, 2.5, 0], [1, -2, 0.25, 0, 0, 0]], np.float32)
    q, scale = int8.quantize(rows)
    np.testing.assert_array_equal(q[0], [127, -127, 0, 2, 2, 0])
    assert scale[0] == 1
    assert np.abs(q * scale[:, None] - rows).max() <= 0.5001 * scale.max()


def test_quantize_extremes() -> None:
    """Zeros and tiny rows vanish; infinities and NaNs show in the scale."""
    rows = np.array([[0, 0], [1e-38, 0], [np.inf, 1], [1, np.nan]], np.float32)
    q, scale = int8.quantize(rows)
    assert not q.any()
    np.testing.assert_array_equal(scale, [0, 0, np.nan, np.nan])


def test_levels() -> None:
    """Whole levels stay; others, or a range of more than 255, are rounded to 127 steps."""
    levels = np.array([[0, 255, 3, 4], [-127, 128, 0, 1], [0, 0.5, 1, 0.25], [-200, 200, 0, 0]], np.float32)
    whole, units = int8.integer_levels(levels)
    np.testing.assert_array_equal(whole[:2], levels[:2])
    np.testing.assert_array_equal(units[:2], [1, 1])
    np.testing.assert_array_equal(whole[2], [0, 64, 127, 32])
    assert np.abs(whole[3]).max() == 127


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rank", [0, 8])
def test_near_the_exact_product(bits: int, rank: int) -> None:
    """Rounding x to 8 bits in groups of 64 leaves an error of about half of 1/127 of the largest in each group, spread
    over many terms: well below 2 % of the largest output."""
    op = WIDE.draw(bits=bits, rank=rank, bias=True, has_offset=bits > 2, planes=2, in_features=256, tokens=(5,))
    exact = op.expected()
    got = int8.codebook_matmul(op.inputs, op.attributes)
    assert got.dtype == exact.dtype
    error = np.abs(got.astype(np.float64) - exact.astype(np.float64)).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.02


def test_small_integers_are_exact() -> None:
    """Activations that are whole numbers up to 127, with 127 among them in each group, lose nothing to rounding."""
    op = WIDE.draw(bits=4, param_bits=32, planes=1, has_offset=False)
    x = np.random.default_rng(0).integers(-126, 127, op.inputs["x"].shape).astype(np.float32)
    x[:, ::64] = 127
    op.inputs["x"] = x
    got = int8.codebook_matmul(op.inputs, op.attributes)
    np.testing.assert_allclose(got.astype(np.float64), op.expected().astype(np.float64), rtol=2e-5, atol=1e-6)
