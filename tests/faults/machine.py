"""Runs of the command line on a disk that fails (`disk.c`): forked from one process that has imported everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.plugins import emulated

SOURCE = Path(__file__).with_name("disk.c")


class Mode(IntEnum):
    """What the disk does at the n-th event, or the clock; the numbers are those of `disk.c`."""

    COUNT = 1
    KILL = 2
    FULL = 3
    BACK = 4
    READ_ONLY = 5


class Machine:
    """A process to fork runs from; use as a context."""

    def __init__(self, work: Path) -> None:
        """Compile the disk and start the process.

        Args:
            work: Where the library goes.

        Raises:
            RuntimeError: The compiler's messages.
        """
        library = work / "libdisk.so"
        command = [
            str(emulated.compiler()),
            "-x",
            "c",
            "-O1",
            "-shared",
            "-fPIC",
            str(SOURCE),
            "-o",
            str(library),
            "-ldl",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        root = Path(__file__).parents[2]
        settings = {"LD_PRELOAD": str(library), "PYTHONPATH": f"{root / '.pkg'}:{root}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server", str(library)],
            env={**os.environ, **settings},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, folder: Path, mode: Mode, number: int, *words: object) -> dict[str, Any]:
        """Run the command line in a child.

        Args:
            folder: Where the disk fails.
            mode: How.
            number: At which event.
            words: Of the command line.

        Returns:
            ``status``: the exit code, or minus the signal; ``seen``: events; ``said``: stderr; ``year``: that of the
            clock at the end, None where the run was killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"folder": str(folder), "mode": int(mode), "number": number, "words": [str(word) for word in words]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer
