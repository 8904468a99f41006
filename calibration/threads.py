"""Work on several small layers at once, each on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

SMALL = 1 << 22
"""Weights of a layer up to which threads gain more from a layer each than from sharing one; bounds the memory."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Calls a function for the layers of a block, see `workers`."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        """Use the threads of a pool, or none."""
        self._pool = pool

    def map(
        self, function: Callable[[Item], Result], items: Sequence[Item], small: Callable[[Item], bool]
    ) -> list[Result]:
        """Return the results in the order of the items.

        Those of small layers begin in that order (give the longest work first), each on a thread; the others follow one
        by one on the caller's threads.
        """
        if self._pool is None:
            return list(map(function, items))
        alone = [small(item) for item in items]
        found = self._pool.map(function, [item for item, one in zip(items, alone, strict=True) if one])
        done = iter(list(found))
        return [next(done) if one else function(item) for item, one in zip(items, alone, strict=True)]


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """Provide as many threads as PyTorch uses, each of which computes alone; on a GPU there is one order of work.

    The many operations of a small layer gain little from threads that share each of them and wait for each other; what
    is computed does not depend on how many layers are worked on at once. Modes such as `torch.no_grad` are not
    inherited.
    """
    count = torch.get_num_threads()
    if device.type != "cpu" or count == 1:
        yield Workers(None)
        return
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            yield Workers(pool)
        finally:
            torch.set_num_threads(count)  # what threads that are made later begin with
