"""Runs verbs in child processes, so that seconds and peak memory are those of one stage alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankbook.tools.errors import CheckFailedError


@dataclass(frozen=True)
class Stage:
    """One finished verb.

    Attributes:
        name: What it was for.
        command: The command line, without the interpreter.
        seconds: Wall time, start of the process included.
        peak_rss_bytes: Largest resident memory of the process and of its own children.
        passed: False if a check failed (exit code 1).
        report: What it printed with ``--json``.
    """

    name: str
    command: str
    seconds: float
    peak_rss_bytes: int
    passed: bool
    report: Any


def run_stage(name: str, arguments: Sequence[str], log: Path) -> Stage:
    """Run ``rankbook <arguments> --json`` in a child process.

    Args:
        name: What it is for.
        arguments: The verb and its flags.
        log: File that gets its log lines, appended.

    Raises:
        CheckFailedError: It ended with an error.
    """
    import rankbook

    root = str(Path(next(iter(rankbook.__path__))).resolve().parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "rankbook.tools", *arguments, "--json"]
    start = time.perf_counter()
    with log.open("a", encoding="utf-8") as errors:
        errors.write(f"$ rankbook {' '.join(arguments)}\n")
        errors.flush()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            output = process.stdout.read() if process.stdout else b""
            # wait4, unlike wait, tells what this one child used.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            process.kill()
            process.wait()
            raise
    seconds = time.perf_counter() - start
    try:
        report = json.loads(output)
    except ValueError:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        message = " ".join(tail) or "no message"
        raise CheckFailedError(f"stage {name!r} ended with code {process.returncode}: {message}; see {log}") from None
    unit = 1 if sys.platform == "darwin" else 1024
    passed = process.returncode == 0
    return Stage(name, f"rankbook {' '.join(arguments)}", seconds, usage.ru_maxrss * unit, passed, report)
