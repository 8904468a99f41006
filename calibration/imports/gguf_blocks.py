"""Blocks of GGUF as codes, scales and offsets: the same numbers, in the order of a record.

The layouts are those of llama.cpp (``ggml-common.h``). A function takes the bytes of blocks (B, bytes of a block) and
returns codes (B, weights of a block), scales (B, groups of a block) and offsets (the same) or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankbook.calibration.imports.base import Numbers
from rankbook.calibration.imports.floats import TWICE_E2M1
from rankbook.calibration.record.codebooks import affine_levels, symmetric_levels
from rankbook.plugins import layout

Bytes = NDArray[Any]
Floats = NDArray[np.float64]
Parts = tuple[Bytes, Floats, "Floats | None"]

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockType:
    """One type of tensors.

    Attributes:
        bits: Of a code.
        size: Bytes of a block.
        read: The function of the module docstring.
        zero: The code whose weight is zero, where a group has no offset.
        levels: Values of the codes where they are no integers in a row; empty elsewhere.
        octaves: Whether scales are powers of two.
    """

    bits: int
    size: int
    read: Callable[[Bytes], Parts]
    zero: int = 0
    levels: tuple[int, ...] = ()
    octaves: bool = False

    def numbers(self, data: Bytes, columns: int, method: str) -> Numbers:
        """Return what rows of blocks (N, bytes of a row) with K = ``columns`` weights are made of."""
        rows = len(data)
        codes, scales, offsets = self.read(np.ascontiguousarray(data).reshape(-1, self.size))
        integers = torch.from_numpy(np.ascontiguousarray(codes.astype(np.uint8))).view(rows, columns)
        planes = [torch.from_numpy(each).view(rows, -1) for each in (scales, offsets) if each is not None]
        if self.levels:
            levels = torch.tensor([self.levels], dtype=torch.float16)
            return Numbers(integers, self.bits, planes, method, levels=levels, octaves=self.octaves)
        if offsets is None:
            return Numbers(integers, self.bits, planes, method, zeros=self.zero)
        narrow = self.bits in layout.BITS
        levels = affine_levels(self.bits) if narrow else symmetric_levels(8)
        integers = integers if narrow else integers + 128
        return Numbers(integers, self.bits if narrow else 8, planes, method, levels=levels)


def _half(data: Bytes, at: int) -> Floats:
    """Return the float16 numbers at a byte of every block, (B, 1)."""
    return np.ascontiguousarray(data[:, at : at + 2]).view(np.float16).astype(np.float64)


def _nibbles(data: Bytes, run: int) -> Bytes:
    """Return the low halves of each ``run`` bytes, then their high halves."""
    parts = data.reshape(len(data), -1, 1, run) >> np.array([[0], [4]], np.uint8)
    return (parts & 15).reshape(len(data), -1)


def _bits(data: Bytes) -> Bytes:
    """Return the bits of bytes, lowest first."""
    return np.unpackbits(data, axis=1, bitorder="little")


def _spread(data: Bytes, run: int, width: int) -> Bytes:
    """Return the fields of ``width`` bits of each ``run`` bytes: the lowest of all, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts = data.reshape(len(data), -1, 1, run) >> shifts
    return (parts & ((1 << width) - 1)).reshape(len(data), -1)


def _q4_0(data: Bytes) -> Parts:
    return _nibbles(data[:, 2:], 16), _half(data, 0), None


def _q4_1(data: Bytes) -> Parts:
    return _nibbles(data[:, 4:], 16), _half(data, 0), _half(data, 2)


def _q5_0(data: Bytes) -> Parts:
    return _nibbles(data[:, 6:], 16) | _bits(data[:, 2:6]) << 4, _half(data, 0), None


def _q5_1(data: Bytes) -> Parts:
    return _nibbles(data[:, 8:], 16) | _bits(data[:, 4:8]) << 4, _half(data, 0), _half(data, 2)


def _q8_0(data: Bytes) -> Parts:
    return data[:, 2:] ^ 128, _half(data, 0), None


def _six_bits(data: Bytes) -> tuple[Bytes, Bytes]:
    """Return the eight scales and eight minimums of 6 bits in 12 bytes of every block."""
    low, high, rest = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([low & 63, rest & 15 | low >> 6 << 4], 1)
    return scales, np.concatenate([high & 63, rest >> 4 | high >> 6 << 4], 1)


def _q4_k(data: Bytes) -> Parts:
    scales, minimums = _six_bits(data[:, 4:16])
    return _nibbles(data[:, 16:], 32), _half(data, 0) * scales, -_half(data, 2) * minimums


def _q5_k(data: Bytes) -> Parts:
    scales, minimums = _six_bits(data[:, 4:16])
    codes = _nibbles(data[:, 48:], 32) | _spread(data[:, 16:48], 32, 1) << 4
    return codes, _half(data, 0) * scales, -_half(data, 2) * minimums


def _q6_k(data: Bytes) -> Parts:
    codes = _nibbles(data[:, :128], 64) | _spread(data[:, 128:192], 32, 2) << 4
    return codes, _half(data, 208) * data[:, 192:208].view(np.int8), None


def _q2_k(data: Bytes) -> Parts:
    scales = data[:, :16]
    return _spread(data[:, 16:80], 32, 2), _half(data, 80) * (scales & 15), -_half(data, 82) * (scales >> 4)


def _q3_k(data: Bytes) -> Parts:
    packed = data[:, 96:108]
    low, high = _nibbles(packed[:, :8], 8), _spread(packed[:, 8:], 4, 2)
    codes = _spread(data[:, 32:96], 32, 2) | _spread(data[:, :32], 32, 1) << 2
    return codes, _half(data, 108) * ((low | high << 4).astype(np.int16) - 32), None


def _iq4_xs(data: Bytes) -> Parts:
    scales = _spread(data[:, 4:8], 1, 4) | _spread(data[:, 2:4], 1, 2) << 4
    return _nibbles(data[:, 8:], 16), _half(data, 0) * (scales.astype(np.int16) - 32), None


def _mxfp4(data: Bytes) -> Parts:
    return _nibbles(data[:, 1:], 16), np.exp2(data[:, :1].astype(np.float64) - 128), None  # levels are doubled


TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(4, 18, _q4_0, zero=8),
    "Q4_1": BlockType(4, 20, _q4_1),
    "Q5_0": BlockType(5, 22, _q5_0, zero=16),
    "Q5_1": BlockType(5, 24, _q5_1),
    "Q8_0": BlockType(8, 34, _q8_0, zero=128),
    "IQ4_NL": BlockType(4, 18, _q4_0, levels=_IQ4_NL),
    "IQ4_XS": BlockType(4, 136, _iq4_xs, levels=_IQ4_NL),
    "MXFP4": BlockType(4, 17, _mxfp4, levels=TWICE_E2M1, octaves=True),
    "Q2_K": BlockType(2, 84, _q2_k),
    "Q3_K": BlockType(3, 110, _q3_k, zero=4),
    "Q4_K": BlockType(4, 144, _q4_k),
    "Q5_K": BlockType(5, 176, _q5_k),
    "Q6_K": BlockType(6, 210, _q6_k, zero=32),
}
"""Types by name. Codes of 5 and 6 bits take 8 in a record."""
