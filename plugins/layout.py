"""Bit layout of packed codes and of per-group parameters: the only definition of byte order in the project.

Letters: N out features, K in features, G groups, Q parameter planes, b bits.

Rows are cut into *panels* of 32 output rows, columns into *blocks* of 32 inputs. One row of one block is ``b`` 32-bit
little-endian words; the words of the 32 rows of a panel stand side by side, 128 bytes, so that a GPU warp reads full
cache lines and a CPU vector register holds the same word of neighbouring rows:

    packed[N / 32][K / 32][b][32 rows][4 bytes]

Inside a word:

* 2, 4 and 8 bits: field ``i`` (lowest bits first) is input ``32 / b * word + i``.
* 3 bits: byte ``j`` of the three words A, B, C holds the eight codes ``c0..c7`` of inputs ``8 j .. 8 j + 7``::

      A = c0 | c1 << 3 | (c6 & 3) << 6
      B = c2 | c3 << 3 | (c7 & 3) << 6
      C = c4 | c5 << 3 | (c6 >> 2) << 6 | (c7 >> 2) << 7

N and K are padded with zero codes to whole panels and blocks; the true sizes travel beside the bytes.
In ONNX the bytes are carried as INT8 (byte - 128), the one integer type that every engine keeps packed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rankbook.plugins.widths import BITS as BITS

PANEL = 32
"""Output rows that share one panel."""
BLOCK = 32
"""Inputs covered by one block of ``bits`` words per row."""

_WORD_BYTES = 4
_AT_ONCE = 1 << 20
"""Codes unpacked at a time: what is made of them on the way stays in the cache of the processor."""

UInt8Array = npt.NDArray[np.uint8]
Int8Array = npt.NDArray[np.int8]


def ceil_div(value: int, divisor: int) -> int:
    """Return ``value / divisor`` rounded up."""
    return -(-value // divisor)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int, int, int]:
    """Return the shape of the packed codes of a (rows, columns) matrix, in bytes.

    Raises:
        ValueError: ``bits`` is not one of `BITS`.
    """
    _check_bits(bits)
    return ceil_div(rows, PANEL), ceil_div(columns, BLOCK), bits, PANEL, _WORD_BYTES


def pack_codes(codes: UInt8Array, bits: int) -> UInt8Array:
    """Pack codes (N, K) uint8, each below ``2**bits``, into `packed_shape` bytes.

    Raises:
        ValueError: A code does not fit, or ``codes`` is not a matrix.
    """
    _check_bits(bits)
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {codes.shape}; give a matrix (N, K)")
    if codes.size and int(codes.max()) >= 1 << bits:
        largest = (1 << bits) - 1
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits; the largest allowed is {largest}")
    rows, columns = codes.shape
    panels, blocks, _, _, _ = packed_shape(rows, columns, bits)
    padded = np.zeros((panels * PANEL, blocks * BLOCK), np.uint8)
    padded[:rows, :columns] = codes
    if bits == 3:
        words = _pack_bytes_3(padded.reshape(panels, PANEL, blocks, _WORD_BYTES, 8))
    else:
        per_byte = 8 // bits
        fields = padded.reshape(panels, PANEL, blocks, bits, _WORD_BYTES, per_byte)
        shifts = (np.arange(per_byte) * bits).astype(np.uint8)
        words = np.bitwise_or.reduce(fields << shifts, axis=-1)
    return np.ascontiguousarray(words.transpose(0, 2, 3, 1, 4))


def unpack_codes(packed: UInt8Array, rows: int, columns: int) -> UInt8Array:
    """Undo `pack_codes`: packed bytes to codes (rows, columns) uint8.

    Raises:
        ValueError: The shape of ``packed`` does not belong to a (rows, columns) matrix.
    """
    if packed.ndim != 5 or packed.shape != packed_shape(rows, columns, packed.shape[2]):
        raise ValueError(
            f"packed codes have shape {packed.shape}, which does not belong to a ({rows}, {columns}) matrix"
        )
    panels, blocks, bits, _, _ = packed.shape
    codes = np.empty((panels * PANEL, columns), np.uint8)
    some = max(1, _AT_ONCE // (PANEL * BLOCK * blocks))
    for begin in range(0, panels, some):
        words = packed[begin : begin + some].transpose(0, 3, 1, 2, 4)  # (panels, 32, blocks, bits, 4)
        if bits == 3:
            found = _unpack_bytes_3(words)
        else:
            shifts = (np.arange(8 // bits) * bits).astype(np.uint8)
            found = (words[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        part = codes[begin * PANEL : (begin + some) * PANEL]
        part[:] = found.reshape(len(part), blocks * BLOCK)[:, :columns]
    return codes[:rows]


def pack_rows(values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Bring per-group parameters (N, G, Q) into panel order (ceil(N / 32), G, Q, 32), zero-padded."""
    rows, groups, planes = values.shape
    panels = ceil_div(rows, PANEL)
    padded = np.zeros((panels * PANEL, groups, planes), values.dtype)
    padded[:rows] = values
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups, planes).transpose(0, 2, 3, 1))


def unpack_rows(packed: npt.NDArray[np.generic], rows: int) -> npt.NDArray[np.generic]:
    """Undo `pack_rows`: (ceil(N / 32), G, Q, 32) to (N, G, Q)."""
    panels, groups, planes, _ = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 3, 1, 2).reshape(panels * PANEL, groups, planes)[:rows])


def to_carrier(packed: UInt8Array) -> Int8Array:
    """Turn bytes into the INT8 values (byte - 128) that carry them through ONNX."""
    return (packed ^ np.uint8(0x80)).view(np.int8)


def from_carrier(carrier: Int8Array) -> UInt8Array:
    """Undo `to_carrier`."""
    return carrier.view(np.uint8) ^ np.uint8(0x80)


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits per code are not supported; choose one of {BITS}")


def _pack_bytes_3(codes: UInt8Array) -> UInt8Array:
    """(..., 4 bytes, 8 codes) to (..., 3 words, 4 bytes)."""
    c = np.moveaxis(codes, -1, 0)
    a = c[0] | c[1] << 3 | (c[6] & 3) << 6
    b = c[2] | c[3] << 3 | (c[7] & 3) << 6
    d = c[4] | c[5] << 3 | (c[6] >> 2) << 6 | (c[7] >> 2) << 7
    return np.stack([a, b, d], axis=-2)


def _unpack_bytes_3(words: UInt8Array) -> UInt8Array:
    """(..., 3 words, 4 bytes) to (..., 4 bytes, 8 codes)."""
    a, b, d = words[..., 0, :], words[..., 1, :], words[..., 2, :]
    parts = [a & 7, a >> 3 & 7, b & 7, b >> 3 & 7, d & 7, d >> 3 & 7]
    parts += [a >> 6 | (d >> 6 & 1) << 2, b >> 6 | d >> 7 << 2]
    return np.stack(parts, axis=-1)
