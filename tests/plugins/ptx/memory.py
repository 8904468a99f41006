"""Memory of the interpreter: every access is checked against what exists, its alignment and, for stores, for races."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.plugins.ptx.parser import PtxError

Array = np.ndarray[Any, Any]
GUARD = 256
"""Bytes between buffers that nobody may touch, and their alignment."""
READ, WRITE = 1, 2


class Space:
    """A state space: ``rows`` separate memories (one per block or lane, or a single one) of ``size`` bytes each.

    Args:
        name: For messages.
        size: Bytes that may be touched.
        rows: How many there are.
        base: The address of the first byte. Not zero, so that a kernel that assumes it is caught.
        fill: What memory holds at first; 0xFF makes every float NaN.

    Attributes:
        arriving: Pieces of 16 bytes that nobody may touch as copies to them are on their way; None if there are none.
    """

    def __init__(self, name: str, size: int, rows: int = 1, base: int = 0, fill: int = 0xFF) -> None:
        self.name, self.size, self.base = name, size, base
        self.pitch = -(-size // 16) * 16
        self.bytes = np.full(self.pitch * rows, fill, np.uint8)
        self.arriving: Array | None = None

    def load(self, addresses: Array, rows: Array | int, dtype: Any, count: int) -> list[Array]:
        """Return ``count`` neighbouring elements per address."""
        at = self._offsets(addresses, rows, np.dtype(dtype).itemsize * count, READ) // np.dtype(dtype).itemsize
        elements = self.bytes.view(dtype)
        return [elements[at + i] for i in range(count)]

    def store(self, addresses: Array, rows: Array | int, values: Sequence[Array]) -> None:
        """Store neighbouring elements at every address; lanes must not store different values in one place."""
        size = values[0].dtype.itemsize
        at = self._offsets(addresses, rows, size * len(values), WRITE) // size
        elements = self.bytes.view(values[0].dtype)
        for i, value in enumerate(values):
            elements[at + i] = value
        for i, value in enumerate(values):
            if not np.array_equal(elements[at + i].view(f"u{size}"), value.view(f"u{size}")):
                raise PtxError(f"lanes store different values at one address of {self.name} memory")

    def places(self, addresses: Array, rows: Array | int, size: int) -> Array:
        """Return where accesses of ``size`` bytes that write to the addresses begin in ``bytes``."""
        return self._offsets(addresses, rows, size, WRITE)

    def _offsets(self, addresses: Array, rows: Array | int, size: int, access: int) -> Array:
        offsets: Array = addresses.astype(np.int64) - self.base
        if (offsets % size).any():
            raise PtxError(f"an access of {size} bytes to {self.name} memory is not aligned")
        wrong = (offsets < 0) | (offsets + size > self.size) | self._forbidden(offsets, size, access)
        if wrong.any():
            where = int(offsets[wrong][0])
            raise PtxError(
                f"an access of {size} bytes at {where} is outside the {self.name} memory ({self.size} bytes)"
            )
        at = offsets + self.pitch * rows
        if self.arriving is not None and self.arriving[at // 16].any():
            raise PtxError(f"an access to {self.name} memory while a copy to it is on its way")
        return at

    def _forbidden(self, offsets: Array, size: int, access: int) -> Array:
        return np.zeros(len(offsets), bool)


class Device(Space):
    """Global memory: buffers with gaps between them. Has the interface of `emulated.Arena`."""

    def __init__(self, size: int = 1 << 22) -> None:
        super().__init__("global", size, base=0x7F0000000000)
        self._allowed = np.zeros(size, np.uint8)
        self._end = GUARD
        self._buffers: dict[int, tuple[Any, tuple[int, ...]]] = {}

    def add(self, values: Array, *, writable: bool = False) -> int:
        """Copy an array to a buffer of its own and return its address."""
        data = np.ascontiguousarray(values)
        start, self._end = self._end, -(-(self._end + data.nbytes) // GUARD) * GUARD + GUARD
        if self._end > self.size:
            raise PtxError(f"the buffers take more than the {self.size} bytes of the device")
        self.bytes[start : start + data.nbytes] = data.reshape(-1).view(np.uint8)
        self._allowed[start : start + data.nbytes] = READ | (WRITE if writable else 0)
        self._buffers[self.base + start] = (data.dtype, data.shape)
        return self.base + start

    def array(self, address: int) -> Array:
        """Return the array at an address given by `add`."""
        dtype, shape = self._buffers[address]
        start, size = address - self.base, int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape).copy()

    def _forbidden(self, offsets: Array, size: int, access: int) -> Array:
        inside = offsets.clip(0, self.size - size)
        return (self._allowed[inside] & self._allowed[inside + size - 1] & access) == 0
