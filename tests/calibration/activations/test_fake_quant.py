"""The rounding formulas of activations, against their definitions and known edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankbook.calibration.activations import fake_quant

seeds = st.integers(0, 1000)


@given(seeds, st.sampled_from([8, 4]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_per_token_error_is_at_most_half_a_step_of_that_token(seed, bits, symmetric):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5, 20, generator=generator) * torch.rand(3, 5, 1, generator=generator) * 10
    got = fake_quant.per_token(x, bits, symmetric=symmetric)
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    wide = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    # The integer zero point moves the ends of the range by up to half a step, so they clip by that much more.
    assert bool(((got - x).abs() <= (0.5 if symmetric else 1.0) * wide + 1e-6).all())
    assert torch.equal(got[1, 2], fake_quant.per_token(x[1, 2], bits, symmetric=symmetric)), "tokens are independent"
    assert bool((fake_quant.per_token(torch.zeros(2, 4), bits, symmetric=symmetric) == 0).all())


def test_per_token_asymmetric_matches_a_worked_example():
    # min -1, max 4: s = 5 / 255, z = round(51) = 51.
    x = torch.tensor([[-1.0, 0.013, 2.51, 4.0]])
    step = 5 / 255
    want = torch.tensor([[round(v / step) * step for v in (-1.0, 0.013, 2.51, 4.0)]])
    assert torch.allclose(fake_quant.per_token(x, 8), want, atol=1e-6)


def test_per_tensor_is_quantize_and_dequantize_of_onnx():
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    x = np.linspace(-9, 9, 1001).astype(np.float32)
    for dtype, zero, symmetric in (("int8", 0, True), ("uint8", 77, False)):
        text = (
            f'<ir_version: 11, opset_import: ["" : 23]> g (float[n] x) => (float[n] y) <float s = {{0.05}},'
            f" {dtype} z = {{{zero}}}> {{ q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z) }}"
        )
        session = onnxruntime.InferenceSession(ir.to_proto(ir.from_onnx_text(text)).SerializeToString())
        (want,) = session.run(None, {"x": x})
        step = float(np.float32(0.05))
        got = fake_quant.per_tensor(torch.from_numpy(x), step, zero, symmetric=symmetric)
        assert np.array_equal(got.numpy(), want)


@given(seeds, st.sampled_from([8, 6, 4]), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_mxint_follows_the_formula_block_by_block(seed, width, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, size, generator=generator) * 3
    got = fake_quant.mxint(x, width)
    mantissa = width - 1
    for row in range(2):
        for start in range(0, size, 16):
            block = x[row, start : start + 16].double()
            exponent = math.ceil(math.log2(float(block.abs().max())))
            top = 2**mantissa - 1
            codes = (block / 2.0**exponent * 2**mantissa).round().clamp(-top, top)
            want = codes / 2**mantissa * 2.0**exponent
            assert torch.equal(got[row, start : start + 16].double(), want)


def test_mxint_saturates_at_powers_of_two_and_keeps_zeros():
    x = torch.zeros(1, 20)
    x[0, 0] = 4.0
    got = fake_quant.mxint(x, 8)
    assert float(got[0, 0]) == 4 * 127 / 128
    assert bool((got[0, 1:] == 0).all())


def test_mxint_is_idempotent_where_no_maximum_is_a_power_of_two():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    once = fake_quant.mxint(x, 8)
    peaks = once.view(4, 4, 16).abs().amax(-1)
    assert bool((peaks.log2() != peaks.log2().round()).all())
    assert torch.equal(fake_quant.mxint(once, 8), once)


@pytest.mark.parametrize("magnitude", [1e-38, 1e38])
def test_mxint_stays_finite_at_the_ends_of_float32(magnitude):
    x = torch.tensor([[magnitude, -magnitude / 3]])
    got = fake_quant.mxint(x, 8)
    assert bool(torch.isfinite(got).all())
    # One part in 127 of the block's range of one octave.
    assert bool(((got - x).abs() <= magnitude / 64).all())


def test_the_dtype_of_the_input_is_kept():
    x = torch.randn(2, 16).bfloat16()
    assert fake_quant.per_token(x, 8).dtype == fake_quant.mxint(x, 8).dtype == torch.bfloat16
    assert fake_quant.per_tensor(x, 0.1, 0, symmetric=True).dtype == torch.bfloat16
