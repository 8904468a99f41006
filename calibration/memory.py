"""The memory of this process: how much it takes, a limit for it, and letting go of pages of mapped files.

Weights are memory-mapped. Their pages count as resident once they have been read, although the system could take them
back at any time; under a limit they are let go of as soon as what they hold has been used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rankbook.calibration.option import ADVANCED, Options, option

_STATUS, _MAPS = Path("/proc/self/status"), Path("/proc/self/smaps")
_SHARE = 8
"""Mapped pages, and what is kept of the calibration text, may take this part of the limit."""
_LEAST_PAGES = 1 << 20
"""Mappings with fewer resident bytes are left alone."""
_DONTNEED = 4
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}


@dataclass
class _Limit:
    """A limit in force.

    Attributes:
        size: In bytes.
        thread: Which one holds it.
        left: Resident bytes of files that were left when pages were let go of the last time: code, for the most part.
    """

    size: int
    thread: int
    left: int = 0


_limits: list[_Limit] = []
"""The innermost one last."""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Options):
    """How much memory to take."""

    memory_limit: str | None = option(
        None,
        "resident memory to aim at, such as 4GiB: weights stay in their files and are read block by block; large"
        " calibration activations and statistics are kept in files beside the output",
        metavar="SIZE",
        group=ADVANCED,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_limit is not None:
            read_size(self.memory_limit)


def read_size(text: str) -> int:
    """Read a size: bytes, or a number with a unit such as MB, MiB, GB or GiB.

    Raises:
        ValueError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", str(text).strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a size of memory; give a number with a unit, such as 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def read_gigabytes(text: str) -> float:
    """Read a size: GB, or a number with a unit as `read_size`.

    Raises:
        ValueError: It is none.
    """
    try:
        return float(text)
    except ValueError:
        return read_size(text) / 1e9


@contextlib.contextmanager
def limited(size: str | None) -> Iterator[None]:
    """Hold a limit, see `MemoryOptions`; None changes nothing."""
    if size is None:
        yield
        return
    _limits.append(_Limit(read_size(size), threading.get_ident()))
    try:
        yield
    finally:
        _limits.pop()


def limit() -> int | None:
    """Return the limit in bytes, or None."""
    return _limits[-1].size if _limits else None


def beyond_share(size: int) -> bool:
    """Return whether something of ``size`` bytes is to wait in a file, because it takes too much of the limit."""
    return bool(_limits) and size > _limits[-1].size // _SHARE


def relieve() -> None:
    """Let go of pages of mapped files where they take too much of the limit; without one, do nothing.

    To be called wherever much has been read, between two steps. Only the thread that holds the limit does something: it
    waits where others solve layers side by side, which may put other memory in the place of a mapping at any time.
    """
    if not _limits or _limits[-1].thread != threading.get_ident():
        return
    if beyond_share((now := _status("RssFile")) - _limits[-1].left):
        release_mapped()
        _limits[-1].left = min(now, _status("RssFile"))


def release_mapped() -> None:
    """Let go of the resident pages of mapped files; they are read again where they are needed.

    Only mappings of which no page was changed, in memory or in swap, are touched, so nothing can be lost as long as no
    other thread ends a mapping meanwhile. Code is left where it is. Without Linux' view of a process, nothing happens.
    """
    if not _MAPS.is_file():
        return
    for begin, end in _idle(_MAPS.read_text("utf-8", "surrogateescape")):
        _madvise()(begin, end - begin, _DONTNEED)


_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) +(/.*)")


def _idle(maps: str) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the mappings of regular files that hold nothing but what is in their file."""
    place: tuple[int, int] | None = None
    sizes: dict[str, int] = {}
    for line in maps.splitlines():
        name, _, value = line.partition(":")
        if name in ("Rss", "Anonymous", "Swap"):
            sizes[name] = int(value.split()[0]) * 1024
            # Swap is the last of them; a changed page that went there is not resident any more.
            clean = name == "Swap" and sizes["Anonymous"] + sizes["Swap"] == 0
            if clean and place is not None and sizes["Rss"] >= _LEAST_PAGES:
                yield place
        elif "-" in name[:20]:
            found = _HEADER.fullmatch(line)
            is_data = found is not None and "x" not in found[3] and found[4] != "0"
            is_data = is_data and not re.match(r"/dev/|/memfd:|/SYSV|.*\.so[.\d]*( |$)", found[5])  # type: ignore[index]
            place = (int(found[1], 16), int(found[2], 16)) if is_data else None  # type: ignore[index]


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    # PyDLL keeps the interpreter's lock, so that no Python code runs meanwhile.
    call = ctypes.PyDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return cast("Callable[[int, int, int], int]", call)


def peak_rss_bytes(*, children: bool = False) -> int:
    """Return the largest resident memory of this process so far, in bytes; mapped files count.

    Args:
        children: Take the largest one of its finished children instead where that is more.
    """
    # Where Linux says it itself: what `getrusage` tells begins with the memory of the process that started this one.
    unit = 1 if sys.platform == "darwin" else 1024
    own = _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit) if children else own


def _status(name: str) -> int:
    """Return an entry of Linux' view of this process in bytes; 0 where there is none."""
    lines = _STATUS.read_text("ascii", "replace").splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
