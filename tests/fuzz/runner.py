"""Gives damaged files to a loader, in a process of its own that may crash or hang."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rankbook.tools.errors import describe
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

MORE_BYTES = 64 << 20
"""How much more memory than ever before an input may take, beyond its own size."""
LONGEST = 1.0
"""Processor seconds that an input may take."""
_HANGS = 60
"""Seconds of the clock after which it is stopped; the first one imports what it needs, maybe on a busy machine."""


@dataclass
class Result:
    """What became of a target.

    Attributes:
        target: Its name.
        inputs: Inputs that were tried.
        refused: Those that were refused with a sentence; the others were read.
        slowest: Most processor seconds of an input.
        failures: One line each, with the number of the input; lines of one kind once.
    """

    target: str
    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(name: str, *, seconds: float, inputs: int, begin: int = 0) -> Result:
    """Try inputs until the time is over; a process that crashes or hangs counts as a failure, and another goes on."""
    result, end, kinds = Result(name), time.monotonic() + seconds, set[str]()
    number, last = begin, begin + inputs
    while time.monotonic() < end and number < last:
        reading, writing = get_context("fork").Pipe()
        process = get_context("fork").Process(target=_work, args=(writing, name, number, last, end), daemon=True)
        process.start()
        writing.close()
        for number, refused, spent, said in _answers(reading, number):  # noqa: B020 (where the next process begins)
            result.inputs += 1
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


def _answers(pipe: Connection, number: int) -> Iterator[tuple[int, bool, float, str]]:
    try:
        while pipe.poll(_HANGS):
            yield pipe.recv()
    except EOFError:
        return
    yield number, False, float(_HANGS), "hangs"


def _work(pipe: Connection, name: str, begin: int, last: int, end: float) -> None:
    for number in range(begin, last):
        if time.monotonic() > end:
            break
        pipe.send((number, *attempt(name, number)))
    pipe.close()


def attempt(name: str, number: int) -> tuple[bool, float, str]:
    """Give one input to a loader.

    Returns:
        Whether it was refused with a sentence, its processor seconds, and what is wrong with the loader, or "".
    """
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        size = _prepare(name, number, folder)
        before, start = _peak(), time.process_time()
        error: BaseException | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                TARGETS[name].load(folder)
        except Exception as raised:
            error = raised
        spent, more = time.process_time() - start, _peak() - before
    finally:
        shutil.rmtree(folder)
    if error is not None and _is_undeclared(error):
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
        if _is_undeclared(error):
            raise
        return describe(error)[0]
    return "read"


_MADE: dict[str, Path] = {}


def _prepare(name: str, number: int, folder: Path) -> int:
    """Write the input; return its size. Everything random comes from the name and the number."""
    if name not in _MADE:
        _MADE[name] = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        TARGETS[name].make(_MADE[name])
    shutil.copytree(_MADE[name], folder, dirs_exist_ok=True)
    rng = random.Random(f"{name} {number}")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    chosen: Any = rng.choice(files)
    chosen.write_bytes(mutated(chosen.read_bytes(), chosen.name, rng))
    return sum(path.stat().st_size for path in files)


def _is_undeclared(error: BaseException) -> bool:
    """Return whether `describe` has no sentence for an exception, but its type and --debug."""
    return "run again with --debug" in describe(error)[0] or isinstance(error, (MemoryError, UnicodeEncodeError))


def _where(error: BaseException) -> str:
    """Name the type and the last place of this project in a traceback, so that inputs of one kind are shown once."""
    place, trace = "", error.__traceback__
    while trace:
        path = Path(trace.tb_frame.f_code.co_filename)
        if "fuzz" not in path.parts and {"calibration", "exporter", "plugins", "tools"} & {*path.parts}:
            place = f"{path.name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
