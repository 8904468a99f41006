"""Asynchronous copies from global to shared memory (cp.async).

What a copy brings is visible from the moment when the lane that started it has waited for its group. Until then any
access to the place raises, also the start of another copy; what it brings is read at its start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.plugins.ptx.memory import Array, Space
from tests.plugins.ptx.parser import PtxError

COPY_BYTES = 16


@dataclass
class _Flight:
    """Copies of one instruction, one per lane: its group, counted from 0 per lane, the place and what comes there."""

    lanes: Array
    groups: Array
    at: Array
    values: Array

    def part(self, chosen: Array) -> _Flight:
        return _Flight(self.lanes[chosen], self.groups[chosen], self.at[chosen], self.values[chosen])


class Copies:
    """What is on its way.

    Args:
        shared: Where it goes.
        lanes: How many lanes start copies and wait for them.
    """

    def __init__(self, shared: Space, lanes: int) -> None:
        self._shared = shared
        self._committed = np.zeros(lanes, np.int64)
        self._flights: list[_Flight] = []

    def start(self, mask: Array, addresses: Array, rows: Array | int, values: Array) -> None:
        """Start a copy of every lane of the mask; it belongs to the group that the lane commits next.

        Args:
            mask: The lanes.
            addresses: Where to, one per lane of the mask.
            rows: Which shared memory each of these lanes sees.
            values: (lanes of the mask, 16) bytes.
        """
        at = self._shared.places(addresses, rows, COPY_BYTES)
        if len(set(at.tolist())) < len(at):
            raise PtxError("two copies go to one place")
        lanes = np.flatnonzero(mask)
        self._flights.append(_Flight(lanes, self._committed[lanes], at, values))
        self._mark()

    def commit(self, mask: Array) -> None:
        """Close the group of every lane of the mask."""
        self._committed[mask] += 1

    def wait(self, mask: Array, pending: int) -> None:
        """Let all groups of these lanes arrive but the last ``pending``."""
        remaining = []
        for flight in self._flights:
            arrives = mask[flight.lanes] & (flight.groups < self._committed[flight.lanes] - pending)
            here = flight.part(arrives)
            self._shared.bytes[here.at[:, None] + np.arange(COPY_BYTES)] = here.values
            if not arrives.all():
                remaining.append(flight.part(~arrives))
        self._flights = remaining
        self._mark()

    def _mark(self) -> None:
        self._shared.arriving = None
        if self._flights:
            arriving = np.zeros(len(self._shared.bytes) // COPY_BYTES, bool)
            for flight in self._flights:
                arriving[flight.at // COPY_BYTES] = True
            self._shared.arriving = arriving


def read_source(memory: Space, addresses: Array, counts: Array) -> Array:
    """Return the (lanes, 16) bytes that copies bring: what lies at the addresses, or zeros where the count is 0.

    Raises:
        PtxError: A count is neither 0 nor 16, or an address is not in the memory.
    """
    full = counts == COPY_BYTES
    if not (full | (counts == 0)).all():
        raise PtxError(f"only copies of 0 or {COPY_BYTES} bytes are known")
    values = np.zeros((len(addresses), COPY_BYTES), np.uint8)
    values[full] = np.stack(memory.load(addresses[full], 0, np.uint32, 4), 1).view(np.uint8)
    return values
