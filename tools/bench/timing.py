"""Times several subjects in turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Progress = Callable[[float], None]


def interleave(subjects: Mapping[str, Callable[[], float]], repeats: int, progress: Progress) -> dict[str, list[float]]:
    """Run every subject ``repeats`` times in turns, after one turn that does not count.

    Args:
        subjects: Functions that do the work and return what they measured, by name.
        repeats: Turns that count.
        progress: Told the fraction done.

    Returns:
        The measured values of each subject, in order.
    """
    measured: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(repeats + 1):
        for index, (name, subject) in enumerate(subjects.items()):
            value = subject()
            if turn:
                measured[name].append(value)
            progress((turn * len(subjects) + index + 1) / ((repeats + 1) * len(subjects)))
    return measured


def clock(threads: int | None) -> Callable[[], float]:
    """Return what to measure seconds with: a single thread's own time, else the wall's.

    The former does not count the turns of other programs; work that is shared among threads has no such clock.
    """
    return time.thread_time if threads == 1 else time.perf_counter


def seconds(work: Callable[[], object], threads: int | None) -> Callable[[], float]:
    """Return a subject that measures the seconds of ``work`` on ``threads`` threads."""
    now = clock(threads)

    def run() -> float:
        start = now()
        work()
        return now() - start

    return run


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median of the ratios first / second of values measured in the same turn."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
