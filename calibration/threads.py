"""Work on several layers at once, each on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Calls a function for several items, see `workers`."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        """Use the threads of a pool, or none."""
        self._pool = pool

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return the results in the order of the items, which begin in that order: give the longest work first."""
        return list(map(function, items) if self._pool is None else self._pool.map(function, items))


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """Provide as many threads as PyTorch uses, each of which computes alone; on a GPU there is one order of work.

    Many small operations of a layer gain little from threads that share each of them and wait for each other; what is
    computed does not depend on how many layers are worked on at once. Modes such as `torch.no_grad` are not inherited.
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
