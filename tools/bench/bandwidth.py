"""What the machine's memory gives to a plain read: the bound of decoding."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rankbook.tools.bench.timing import seconds

_PIECE = 1 << 22
"""Bytes that a thread reads before it takes the next piece, so that none waits for one that was interrupted."""


def reader(threads: int, size: int) -> Callable[[], object]:
    """Return what reads ``size`` bytes from memory once, with so many threads.

    The reduction is numpy's maximum of 64-bit integers, which is vectorized and limited by memory.
    """
    whole = np.ones(size // 8, np.int64)
    if threads == 1:
        return whole.max
    parts, pool = np.array_split(whole, max(threads, size // _PIECE)), ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts))


def read_bandwidth(threads: int, *, size: int = 1 << 28, repeats: int = 5) -> float:
    """Return the bytes per second that ``threads`` read from memory: the best pass over ``size`` bytes."""
    one = seconds(reader(threads, size), threads)
    return size / min(one() for _ in range(repeats + 1))  # the first pass starts the threads
