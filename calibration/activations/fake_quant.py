"""Rounding of activations to a number format and back, in floating point: what an evaluation of low-bit activations is.

Everything is computed in float32 and returned in the dtype of the input. ``round`` is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Numbers that share an exponent in MXINT activations (LQER, Zhang et al. 2024, official code: [1, 16])."""
SMALLEST_STEP = 1e-8
"""Lower bound of a dynamic step (LRQ, Lee et al. 2024, official code), so that a token of zeros stays one."""


def per_token(x: Tensor, bits: int, *, symmetric: bool = False) -> Tensor:
    """Quantize x (..., K) with one range for the last dimension of each token (LRQ, official code, W4A8).

    Asymmetric: ``s = (max - min) / (2**bits - 1)``, an integer zero point, and a range that contains 0 (the official
    code clips instead where all numbers have one sign). Symmetric: ``s = max|x| / (2**(bits - 1) - 1)``.
    """
    values = x.float()
    if symmetric:
        top = (1 << (bits - 1)) - 1
        step = (values.abs().amax(-1, keepdim=True) / top).clamp_min(SMALLEST_STEP)
        return ((values / step).round().clamp(-top - 1, top) * step).to(x.dtype)
    top = (1 << bits) - 1
    low = values.amin(-1, keepdim=True).clamp_max(0)
    high = values.amax(-1, keepdim=True).clamp_min(0)
    step = ((high - low) / top).clamp_min(SMALLEST_STEP)
    zero = (-low / step).round().clamp(0, top)
    return (((values / step).round() + zero).clamp(0, top).sub(zero) * step).to(x.dtype)


def per_tensor(x: Tensor, step: float, zero: int, *, symmetric: bool) -> Tensor:
    """Quantize x to 8 bits with a fixed step: to [-128, 127] where symmetric, else to [0, 255] around ``zero``.

    As ONNX QuantizeLinear followed by DequantizeLinear: ``(clamp(round(x / step) + zero) - zero) * step``.
    """
    values = x.float()
    low, high = (-128, 127) if symmetric else (0, 255)
    return (((values / step).round() + zero).clamp(low, high).sub(zero) * step).to(x.dtype)


def mxint(x: Tensor, width: int, block: int = BLOCK) -> Tensor:
    """Quantize x (..., K) to block floating point with ``width`` bits, sign and magnitude (LQER, official code).

    Per block of the last dimension: ``e = clamp(ceil(log2 max|x|), -127, 128)`` and ``width - 1`` bits of mantissa, so
    a maximum that is a power of two saturates. The last block may be shorter.
    """
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -size % block))
    blocks = padded.reshape(*padded.shape[:-1], -1, block)
    mantissa = width - 1
    peak = blocks.abs().amax(-1, keepdim=True)
    # A block of zeros may have any exponent; that of the smallest normal number keeps the logarithm finite.
    exponent = peak.clamp_min(torch.finfo(torch.float32).tiny).log2().ceil().clamp(-127, 128)
    top = (1 << mantissa) - 1
    # Two factors, each within the range of float32, in place of one that is not.
    step = (exponent / 2).floor().exp2(), (exponent - (exponent / 2).floor() - mantissa).exp2()
    codes = (blocks / step[0] / step[1]).round().clamp(-top, top)
    return (codes * step[0] * step[1]).reshape(padded.shape)[..., :size].to(x.dtype)
