"""What the machine's memory gives to a plain read: the bound of decoding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rankbook.tools.bench.timing import seconds


def read_bandwidth(threads: int, *, size: int = 1 << 28, repeats: int = 5) -> float:
    """Return the bytes per second that ``threads`` read from memory: the best pass over ``size`` bytes.

    The reduction is numpy's maximum of 64-bit integers, which is vectorized and limited by memory.
    """
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            if threads == 1:
                parts[0].max()
            else:
                list(pool.map(np.max, parts))

        one = seconds(read, threads)
        return size / min(one() for _ in range(repeats + 1))  # the first pass starts the threads
