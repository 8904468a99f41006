"""The environments that `make test-ecosystem` makes, one for each program."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_of(name: str) -> Path:
    """Return the interpreter of an environment, whether it is there or not."""
    return ROOT / "build" / "ecosystem" / name / "bin" / "python"


def needs(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips tests without an environment."""
    reason = f"there is no environment with {name}: make test-ecosystem"
    return pytest.mark.skipif(not python_of(name).is_file(), reason=reason)


def run_in(name: str, script: str, *arguments: str | Path) -> str:
    """Run a script in an environment and return what it prints."""
    done = _run(name, script, arguments, with_rankbook=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def refused_in(name: str, script: str, *arguments: str | Path) -> str:
    """Run a script where rankbook is not on the path; it must fail. Return its errors."""
    done = _run(name, script, arguments, with_rankbook=False)
    assert done.returncode != 0, done.stdout[-4000:]
    return done.stderr


def _run(
    name: str, script: str, arguments: Sequence[str | Path], *, with_rankbook: bool
) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(ROOT / ".pkg")} if with_rankbook else {}
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**kept, **path, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [str(python_of(name)), "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=python_of(name).parent
    )
