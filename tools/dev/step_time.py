"""Times decode steps of several texts at once in exported files, without a server around them.

    python -m rankbook.tools.dev.step_time float-cache half-cache --rows 1 8 --positions 16 100 500

Each file is a folder of `export --graph ort` or `static`. Files, numbers of rows and lengths take turns, and the least
time of each counts, so that a noisy machine falls on all alike. The texts are random tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankbook.tools import errors
from rankbook.tools.report import Table
from rankbook.tools.runtimes import Setting, open_model

if TYPE_CHECKING:
    from rankbook.tools.serve.slots import Slots


@dataclass(frozen=True)
class StepTime:
    """One measurement.

    Attributes:
        file: Name of the folder.
        rows: Texts that are decoded together.
        positions: Tokens of each before the first step.
        milliseconds: The least time of a step.
        speed: Tokens a second relative to the smallest number of rows of this file and length.
    """

    file: str
    rows: int
    positions: int
    milliseconds: float
    speed: float = 1.0


def measure(slots: Slots, rows: int, positions: int, *, steps: int, seed: int = 0) -> float:
    """Return the least seconds of a step of so many rows behind random texts of so many tokens."""
    import numpy as np

    rng, times = np.random.default_rng(seed), []
    for row in range(slots.count):
        slots.clear(row)
    for row in range(rows):
        slots.extend(row, rng.integers(0, 256, positions))  # of any vocabulary
    for _ in range(steps):
        tokens = {row: int(token) for row, token in enumerate(rng.integers(0, 256, rows))}
        start = time.perf_counter()
        slots.step(tokens)
        times.append(time.perf_counter() - start)
    return min(times)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, and print a table or JSON."""
    from rankbook.tools.serve.slots import slots_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--kernels", default="auto", help="as for `rankbook serve` (default: auto)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--positions", type=int, nargs="+", default=[16, 100, 500], metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--turns", type=int, default=6, metavar="N")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="of each turn")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    context = max(given.positions) + given.steps
    opened = {
        path.name: slots_of(open_model(path, given.kernels, Setting(given.threads)), max(given.rows), context)
        for path in given.files
    }
    cases = [(name, rows, length) for length in given.positions for rows in given.rows for name in opened]
    least = dict.fromkeys(cases, float("inf"))
    for turn in range(given.turns):
        for name, rows, length in cases:
            found = measure(opened[name], rows, length, steps=given.steps, seed=turn)
            least[name, rows, length] = min(least[name, rows, length], found)
    fewest = min(given.rows)
    results = [
        StepTime(name, rows, length, seconds * 1e3, rows / seconds / (fewest / least[name, fewest, length]))
        for (name, rows, length), seconds in least.items()
    ]
    if given.json:
        print(json.dumps([asdict(result) for result in results]))
        return errors.OK
    lines = [
        (item.file, item.rows, item.positions, f"{item.milliseconds:.2f}", f"{item.speed:.2f}") for item in results
    ]
    Table("decode steps", ("file", "texts", "tokens before", "ms", "speed"), lines).show(sys.stdout)
    return errors.OK


if __name__ == "__main__":
    sys.exit(main())
