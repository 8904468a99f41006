"""Runs a module in a child process: JSON in and out, bounded output, its time and memory, and no process left behind.

A child gets its request as JSON on stdin. It may print lines ``{"progress": 0.4, "phase": "..."}`` while it works; its
report is the last JSON object on stdout that begins a line. What it says on stderr goes to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rankbook.calibration.memory import peak_rss_bytes
from rankbook.tools.errors import CheckFailedError

MOST_OUTPUT_BYTES = 1 << 26
"""A child that prints more is ended: no report is as long."""


@dataclass(frozen=True)
class Finished:
    """A child that ended.

    Attributes:
        code: Its exit code.
        report: What it reported, or None.
        message: The last lines that it said on stderr.
        seconds: Wall time, start of the process included.
        cpu_seconds: Processor time of it and its own children.
        peak_rss_bytes: Largest resident memory of it or of one of its own children.
    """

    code: int
    report: Any
    message: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run_module(
    module: str,
    arguments: Sequence[str] = (),
    request: Any = None,
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
    progress: Callable[[float, str | None], None] | None = None,
) -> Finished:
    """Run ``python -m module`` to its end.

    On Linux it ends when this process does, however that ends, and all that it started ends with it.

    Args:
        module: Its dotted name; it is the main module of the child.
        arguments: Its command line.
        request: What it gets as JSON on stdin.
        python: Interpreter.
        environment: Its environment; this process' own when None. The child always finds this very package.
        log: File to which stderr is appended; without one only its end is kept.
        progress: Called with what the child reports while it works.

    Raises:
        CheckFailedError: It printed too much.
    """
    words = [python, "-m", "rankbook.tools.child", str(os.getpid()), module, *arguments]
    start = time.perf_counter()
    with (
        log.open("ab+") if log else tempfile.TemporaryFile() as errors,
        tempfile.NamedTemporaryFile(prefix="rankbook-usage-") as usage,
    ):
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL if request is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**package_environment(environment), _USAGE: usage.name},
            start_new_session=True,
        )
        try:
            report = _talk(process, request, progress or (lambda *_: None))
            code = process.wait()
        finally:
            _end(process)
        measured = json.loads(usage.read() or b"{}")
        message = _last_lines(errors)
    seconds = time.perf_counter() - start
    return Finished(code, report, message, seconds, measured.get("cpu_seconds", 0.0), measured.get("peak_rss_bytes", 0))


_USAGE = "RANKBOOK_CHILD_USAGE"
"""Names the file into which the child writes what it used: only itself knows its memory without its parent's."""


def package_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment, this process' own when None, in which Python finds this very package."""
    import rankbook

    environment = dict(os.environ if base is None else base)
    root = str(Path(next(iter(rankbook.__path__))).parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    return environment


def _talk(process: subprocess.Popen[bytes], request: Any, progress: Callable[[float, str | None], None]) -> Any:
    """Send the request and read until the child closes its output; return its report."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # broken: a child that does not ask
            stdin.write(json.dumps(request).encode())
    if process.stdout is None:
        return None
    kept: list[bytes] = []
    size = 0
    for line in _lines(process.stdout):
        size += len(line)
        if size > MOST_OUTPUT_BYTES:
            raise CheckFailedError(f"the child process printed more than {MOST_OUTPUT_BYTES >> 20} MiB and was ended")
        event = _event(line)
        if event is None:
            kept.append(line)
        else:
            progress(float(event["progress"]), event.get("phase"))
    return _report(b"".join(kept))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    while line := stream.readline(MOST_OUTPUT_BYTES + 1):
        yield line


def _event(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b'{"progress":'):
        return None
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return event


def _report(output: bytes) -> Any:
    """Return the last JSON object that begins a line; libraries print, too, what is none."""
    text = "\n" + output.decode("utf-8", "replace")
    at = len(text)
    while (at := text.rfind("\n{", 0, at)) >= 0:
        with contextlib.suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, at + 1)[0]
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child if it still runs, with what shares its process group: politely, then without asking."""
    for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    if process.stdout is not None:
        process.stdout.close()


def _last_lines(errors: IO[bytes], count: int = 3) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4096))
    return " ".join(errors.read().decode("utf-8", "replace").strip().splitlines()[-count:])


def request() -> Any:
    """Return, in the child, what `run_module` was given."""
    return json.load(sys.stdin)


def say(event: Mapping[str, Any]) -> None:
    """Report, in the child: progress, or at the end the report."""
    print(json.dumps(event), flush=True)


def _main(parent: int, module: str, arguments: Sequence[str]) -> None:
    """Be the child: end with the parent, run the module, leave behind what was used."""
    watcher = 0
    if sys.platform == "linux":
        _on_death_of_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            return
        watcher = _watch()
    usage = Path(os.environ.pop(_USAGE))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        usage.write_text(json.dumps({"cpu_seconds": cpu, "peak_rss_bytes": peak_rss_bytes(children=True)}))
        if watcher:
            os.kill(watcher, signal.SIGKILL)
            os.waitpid(watcher, 0)


def _on_death_of_parent(number: int) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)


def _watch() -> int:
    """Fork a process that outlives this one to end its process group; return its id.

    A signal at the parent's death is not inherited: of what this process starts, Linux would end nothing.
    """
    watched = os.getpid()
    if child := os.fork():
        return child
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    os.closerange(0, 3)  # whoever reads the output waits for its end
    _on_death_of_parent(signal.SIGUSR1)
    if os.getppid() == watched:
        signal.sigwait({signal.SIGUSR1})
    os.killpg(0, signal.SIGKILL)  # this process is one of them
    os._exit(0)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
