"""Compares the decoding speed of two builds of the ONNX Runtime library, step by step in turns in one process.

    python -m rankbook.tools.dev.library_turns BEFORE.so AFTER.so MODEL.onnx --threads 1 2 --turns 100

Both sessions live in the same process and take turns of a few steps, so that a noisy machine falls on both alike: whole
`rankbook bench` runs in turns left 8 % undecided where these decide 2 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from rankbook.plugins import library
from rankbook.tools.bench.timing import interleave
from rankbook.tools.runtimes.ort import OrtModel

_PROMPT = 64
"""Tokens in the cache before the first step."""
_STEPS = 16
"""Steps of a turn, of which the median counts."""
_PAUSE = 0.05
"""Seconds before a turn in which the other session's threads stop spinning."""


@dataclass(frozen=True)
class Comparison:
    """The later library relative to the earlier one.

    Attributes:
        threads: Threads within an operator.
        milliseconds: Median of a decode step, before and after.
        fastest: Fastest turn of each, in the same unit.
        speed: Mean over the turns of (time before / time after): above 1 the later one is faster.
        uncertainty: Standard error of that mean.
    """

    threads: int
    milliseconds: tuple[float, float]
    fastest: tuple[float, float]
    speed: float
    uncertainty: float


def compare(before: Path, after: Path, model: Path, *, kernels: str, threads: int, turns: int) -> Comparison:
    """Decode with both libraries in turns.

    Raises:
        UsageError: The model is no exported file.
    """
    named = {"before": before.resolve(), "after": after.resolve()}
    subjects = {name: _subject(model, path, kernels, threads) for name, path in named.items()}
    times = interleave(subjects, turns, lambda _fraction: None)
    pairs = list(zip(times["before"], times["after"], strict=True))
    ratios = [first / second for first, second in pairs]
    return Comparison(
        threads,
        (statistics.median(times["before"]) * 1e3, statistics.median(times["after"]) * 1e3),
        (min(times["before"]) * 1e3, min(times["after"]) * 1e3),
        statistics.mean(ratios),
        statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("inf"),
    )


def _subject(model: Path, path: Path, kernels: str, threads: int) -> Callable[[], float]:
    with patch.object(library, "library", lambda _kind: path):
        opened = OrtModel(model, threads=threads, kernels=kernels)
    prompt = np.arange(1, _PROMPT + 1)[None]

    def turn() -> float:
        opened.start(prompt)
        time.sleep(_PAUSE)
        spans = []
        for step in range(_STEPS):
            start = time.perf_counter()
            opened.step(step + 1)
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)

    return turn


def main(words: Sequence[str] | None = None) -> int:
    """Compare two libraries and print the result as a table, or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="librankbook_ort.so of the earlier build")
    parser.add_argument("after", type=Path, help="librankbook_ort.so of the later build")
    parser.add_argument("model", type=Path, help="exported file or folder")
    parser.add_argument("--kernels", default="native-int8", choices=("native", "native-int8"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    for threads in given.threads:
        found = compare(
            given.before, given.after, given.model, kernels=given.kernels, threads=threads, turns=given.turns
        )
        if given.json:
            print(json.dumps(asdict(found)))
        else:
            first, second = found.milliseconds
            print(
                f"{threads} thread(s): {first:.3f} and {second:.3f} ms a step, speed {found.speed:.3f}"
                f" +- {found.uncertainty:.3f} of the earlier library"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
