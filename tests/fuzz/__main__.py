"""Tries damaged files on every loader: ``python -m tests.fuzz [--seconds N] [--target NAME] [--number K]``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.runner import run, try_one
from tests.fuzz.targets import TARGETS


def main() -> int:
    """Run every target for some seconds each; return 1 where a loader failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--inputs", type=int, default=sys.maxsize, help="at most, for each target")
    parser.add_argument("--target", action="append", metavar="NAME", help="this one alone; may be given again")
    parser.add_argument("--begin", type=int, default=0, help="number of the first input")
    parser.add_argument("--number", type=int, help="this input alone, with a traceback")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--native", action="store_true", help="models for the native library in place of loaders")
    parser.add_argument("--list", action="store_true", help="only name the targets")
    given = parser.parse_args()
    names = given.target or list(TARGETS)
    if given.native:
        from tests.fuzz.native import NATIVE

        TARGETS.update(NATIVE)
        names = given.target or list(NATIVE)
    if given.list:
        print("\n".join(names))
        return 0
    if given.number is not None:
        for name in names:
            print(f"{name}: {try_one(name, given.number)}")
        return 0
    results = []
    for name in names:
        result = run(name, seconds=given.seconds, inputs=given.inputs, begin=given.begin)
        results.append(result)
        each = result.seconds / max(result.inputs, 1) * 1e3
        print(
            f"{result.target}: {result.inputs} inputs of {each:.1f} ms, the slowest {result.slowest * 1e3:.0f} ms;"
            f" {result.refused} refused, {len(result.failures)} failures"
        )
        for failure in result.failures[:20]:
            print(f"  {failure}", flush=True)
    if given.output:
        given.output.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
