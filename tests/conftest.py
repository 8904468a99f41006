"""The suite in several processes (pytest-xdist): how many there are, what each may use, which files come first.

A file is the unit (``--dist loadfile``), so that what its tests share is made once.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_WORKER_BYTES = 5 << 30
"""Memory that a process may need: the tests of export above 2 GiB, and compilers."""


@pytest.fixture
def one_trace() -> Iterator[None]:
    """Trace one checkpoint once for all files that differ by the passes alone."""
    from rankbook.tools.dev.families import traced_once

    with traced_once():
        yield


def pytest_xdist_auto_num_workers() -> int:
    """Return what ``-n auto`` means: the usable cores, as far as memory goes, and 0, this process alone, below two."""
    cores = min([float(len(os.sched_getaffinity(0))), *_control_group("cpu.max")])
    memory = min([float(psutil.virtual_memory().available), *_control_group("memory.max")])
    count = int(min(cores, memory / _WORKER_BYTES))
    return count if count > 1 else 0


def _control_group(name: str) -> list[float]:
    """Return the limit of a container, if it has one: bytes, or processors from a quota and its period."""
    try:
        first, *period = Path("/sys/fs/cgroup", name).read_text().split()
        return [float(first) / (float(period[0]) if period else 1)]
    except (OSError, ValueError):  # another system, or "max"
        return []


def pytest_configure() -> None:
    """Give each process its share of the cores, before anything loads a library that asks; use no cache of the user."""
    os.environ.setdefault("RANKBOOK_CACHE", "")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if count:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no process ends with one while the others wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    every = collections.Counter(item.path for item in items)
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -every[item.path]))
