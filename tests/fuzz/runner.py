"""Gives damaged files to a loader, in a process of its own that may crash or hang."""

from __future__ import annotations

import atexit
import contextlib
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rankbook.tools.errors import describe
from tests.fuzz.mutations import mutated, replace_file
from tests.fuzz.targets import TARGETS

MORE_BYTES = 64 << 20
"""How much more memory than before it an input may take, beyond its own size."""
LONGEST = 1.0
"""Processor seconds that an input may take."""
_STOPPED = 5.0
"""Processor seconds after which it is stopped."""
_HANGS, _IMPORTS = 60, 600
"""Seconds of the clock after which its process is ended, and those for what the loader imports before the first one."""
_RESERVED = 1 << 30
"""More address space than this is not given: arrays of absurd sizes fail although nobody touches their memory."""
_MEMORY_DISK = Path("/dev/shm")
"""Inputs are written here, where it is: a disk would be most of their time."""


@dataclass
class Result:
    """What became of a target.

    Attributes:
        target: Its name.
        inputs: Inputs that were tried.
        refused: Those that were refused with a sentence; the others were read.
        seconds: Processor seconds of all inputs, those of changing and writing them included.
        slowest: Most processor seconds that a loader took for an input.
        failures: One line each, with the number of the input; lines of one kind once.
    """

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(name: str, *, seconds: float, inputs: int, begin: int = 0) -> Result:
    """Try inputs until the time is over; a process that crashes or hangs counts as a failure, and another goes on."""
    result, end, kinds = Result(name), time.monotonic() + seconds, set[str]()
    number, last = begin, begin + inputs
    made(name)  # here, so that the processes share it
    while time.monotonic() < end and number < last:
        reading, writing = get_context("fork").Pipe()
        process = get_context("fork").Process(target=_work, args=(writing, name, number, last, end), daemon=True)
        process.start()
        writing.close()
        for number, whole, refused, spent, said in _answers(reading, number):  # noqa: B020 (the next one begins there)
            result.inputs += 1
            result.seconds += whole
            result.refused += refused
            result.slowest = max(result.slowest, spent)
            if said and (kind := said.partition(" | ")[0]) not in kinds:
                kinds.add(kind)
                result.failures.append(f"{number}: {said}")
        process.join(_HANGS)
        process.kill()
        process.join()
        if process.exitcode:
            result.failures.append(f"{number + 1}: the process ended with {process.exitcode} (crash, or stopped)")
        number += 1 + bool(process.exitcode)
    return result


def _answers(pipe: Connection, number: int) -> Iterator[tuple[int, float, bool, float, str]]:
    try:
        if pipe.poll(_IMPORTS):
            pipe.recv()
        while pipe.poll(_HANGS):
            answer = pipe.recv()
            number = answer[0] + 1
            yield answer
    except EOFError:
        return
    yield number, float(_HANGS), False, float(_HANGS), "hangs"


def _work(pipe: Connection, name: str, begin: int, last: int, end: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # of the tests' runner
    torch.set_num_threads(1)
    with contextlib.suppress(Exception):  # imports what it needs
        TARGETS[name].load(made(name))
    pipe.send(None)
    resource.setrlimit(resource.RLIMIT_AS, (_size_of_process() + _RESERVED, resource.RLIM_INFINITY))
    for number in range(begin, last):
        if time.monotonic() > end:
            break
        start = time.process_time()
        answer = attempt(name, number)
        pipe.send((number, time.process_time() - start, *answer))
    pipe.close()


def _size_of_process() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


class _EndlessError(BaseException):
    """An input takes too long; nothing that a loader catches."""


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Raise `_EndlessError` in the block after some time."""

    def stop(*_: object) -> None:
        raise _EndlessError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _STOPPED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(name: str, number: int) -> tuple[bool, float, str]:
    """Give one input to a loader.

    Returns:
        Whether it was refused with a sentence, its processor seconds, and what is wrong with the loader, or "".
    """
    folder = Path(tempfile.mkdtemp(dir=place()))
    try:
        size = _prepare(name, number, folder)
        before, start = _peak(again=True), time.process_time()
        error: BaseException | None = None
        try:
            with warnings.catch_warnings(), _stopping():
                warnings.simplefilter("ignore")
                TARGETS[name].load(folder)
        except (Exception, _EndlessError) as raised:
            error = raised
        spent, more = time.process_time() - start, _peak() - before
    finally:
        shutil.rmtree(folder)
    if isinstance(error, _EndlessError):
        return False, spent, f"endless {_where(error)}"
    if error is not None and is_undeclared(error):
        return False, spent, f"{_where(error)} | {str(error)[:200]!r}"
    if spent > LONGEST:
        return False, spent, f"slow | {spent:.1f} s"
    if more > size + MORE_BYTES:
        return False, spent, f"memory | {more >> 20} MiB for {size >> 10} KiB"
    return error is not None, spent, ""


def try_one(name: str, number: int) -> str:
    """Return what becomes of one input, in this process; exceptions that are no answer pass through."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    _prepare(name, number, folder)
    print(f"the input is kept in {folder}")
    try:
        TARGETS[name].load(folder)
    except Exception as error:
        if is_undeclared(error):
            raise
        return describe(error)[0]
    return "read"


@cache
def place() -> Path:
    """Return a folder for all inputs, which goes with the process that asked first."""
    folder = tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY_DISK if _MEMORY_DISK.is_dir() else None)
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def made(name: str) -> Path:
    """Return the valid files of a target."""
    folder = Path(tempfile.mkdtemp(dir=place()))
    TARGETS[name].make(folder)
    return folder


def _prepare(name: str, number: int, folder: Path) -> int:
    """Write the input; return its size. Everything random comes from the name and the number."""
    shutil.copytree(made(name), folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    rng = random.Random(f"{name} {number}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    size = sum(path.stat().st_size for path in files)
    chosen: Any = rng.choice(files)
    if rng.random() < 0.01:  # no file any more
        replace_file(chosen, folder.parent, rng)
    else:
        chosen.write_bytes(mutated(chosen.read_bytes(), chosen.name, rng))
        size = max(size, chosen.stat().st_size)
    return size


def is_undeclared(error: BaseException) -> bool:
    """Return whether `describe` has no sentence for an exception but its type, or one that is about something else."""
    other = isinstance(error, (MemoryError, UnicodeEncodeError, ImportError))
    return other or "run again with --debug" in describe(error)[0]


def _where(error: BaseException) -> str:
    """Name the type and the last place of this project in a traceback, so that inputs of one kind are shown once."""
    place, trace = "", error.__traceback__
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if "fuzz" not in path.parts and {"calibration", "exporter", "plugins", "tools"} & {*path.parts}:
            place = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


def _peak(*, again: bool = False) -> int:
    """Return the most memory that this process has held, ``again`` from now on."""
    if again:
        with contextlib.suppress(OSError):  # where it is not allowed, inputs are held against the largest before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
