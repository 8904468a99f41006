"""Python in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_python(code: str) -> str:
    """Run ``code`` in a new interpreter; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
