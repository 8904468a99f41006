"""Runs verbs in child processes, so that seconds and peak memory are those of one stage alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankbook.tools.child import run_module
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
    command = f"rankbook {' '.join(arguments)}"
    with log.open("a", encoding="utf-8") as lines:
        lines.write(f"$ {command}\n")
    done = run_module("rankbook.tools", [*arguments, "--json"], log=log)
    if done.report is None:
        raise CheckFailedError(f"stage {name!r} ended with code {done.code}: {done.message or 'no message'}; see {log}")
    return Stage(name, command, done.seconds, done.peak_rss_bytes, done.code == 0, done.report)
