"""The packed layout: round trips, and the byte order as the docstring of the module defines it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankbook.plugins import layout

SIZES = st.tuples(st.integers(1, 70), st.integers(1, 100))


def codes_of(rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    """Random codes."""
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(layout.BITS), st.integers(0, 1 << 30))
def test_codes_round_trip(size: tuple[int, int], bits: int, seed: int) -> None:
    codes = codes_of(*size, bits, seed)
    packed = layout.pack_codes(codes, bits)
    assert packed.shape == layout.packed_shape(*size, bits)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    assert np.array_equal(layout.unpack_codes(packed, *size), codes)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 4), st.sampled_from(["int8", "float16", "float32"]))
def test_rows_round_trip(rows: int, groups: int, planes: int, dtype: str) -> None:
    values = np.random.default_rng(0).integers(-100, 100, (rows, groups, planes)).astype(dtype)
    packed = layout.pack_rows(values)
    assert packed.shape == (-(-rows // 32), groups, planes, 32)
    assert packed.dtype == values.dtype
    assert np.array_equal(layout.unpack_rows(packed, rows), values)
    assert packed[0, groups - 1, planes - 1, rows % 32 - 1 if rows < 32 else 31] == values[min(rows, 32) - 1, -1, -1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 30))
def test_carrier_round_trip(seed: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (2, 3, 3, 32, 4)).astype(np.uint8)
    carrier = layout.to_carrier(packed)
    assert carrier.dtype == np.int8
    assert np.array_equal(carrier.astype(int) + 128, packed.astype(int))
    assert np.array_equal(layout.from_carrier(carrier), packed)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_byte_order_of_whole_fields(bits: int) -> None:
    codes = codes_of(64, 96, bits, 1)
    packed = layout.pack_codes(codes, bits)
    words = packed.view("<u4")[..., 0].astype(np.uint64)  # (panels, blocks, bits, 32 rows)
    per_word = 32 // bits
    for panel, block, word, row, field in [(0, 0, 0, 0, 0), (1, 2, bits - 1, 31, per_word - 1), (0, 1, 1, 7, 1)]:
        value = int(words[panel, block, word, row]) >> (bits * field) & ((1 << bits) - 1)
        assert value == codes[32 * panel + row, 32 * block + per_word * word + field]


def test_byte_order_of_three_bits() -> None:
    codes = codes_of(32, 64, 3, 2)
    packed = layout.pack_codes(codes, 3).astype(int)
    for block in range(2):
        for row in (0, 13, 31):
            for j in range(4):
                c = codes[row, 32 * block + 8 * j : 32 * block + 8 * j + 8].astype(int)
                a, b, d = (packed[0, block, word, row, j] for word in range(3))
                assert a == c[0] | c[1] << 3 | (c[6] & 3) << 6
                assert b == c[2] | c[3] << 3 | (c[7] & 3) << 6
                assert d == c[4] | c[5] << 3 | (c[6] >> 2) << 6 | (c[7] >> 2) << 7


def test_padding_is_zero_codes() -> None:
    packed = layout.pack_codes(np.full((33, 33), 7, np.uint8), 3)
    whole = layout.unpack_codes(packed, 64, 64)
    assert whole[33:].max() == whole[:, 33:].max() == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        layout.pack_codes(np.zeros((2, 2), np.uint8), 5)
    with pytest.raises(ValueError, match="largest allowed is 7"):
        layout.pack_codes(np.full((2, 2), 8, np.uint8), 3)
    with pytest.raises(ValueError, match="matrix"):
        layout.pack_codes(np.zeros(4, np.uint8), 3)
    with pytest.raises(ValueError, match="does not belong"):
        layout.unpack_codes(np.zeros((1, 1, 3, 32, 4), np.uint8), 33, 32)
    with pytest.raises(ValueError, match="choose one of"):
        layout.unpack_codes(np.zeros((1, 1, 5, 32, 4), np.uint8), 32, 32)
