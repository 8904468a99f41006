"""What a command says while it works: log lines and progress, all on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rankbook.calibration.memory import peak_rss_bytes
from rankbook.tools.report import printable

Progress = Callable[[float, "str | None"], None]
"""Shows how far a step is: the fraction done, 0 to 1, and what is being done (or None)."""


class Console:
    """Log lines and progress bars on stderr; silent when ``quiet``, no bars when stderr is not a terminal."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bars = not quiet and sys.stderr.isatty()

    def log(self, message: str) -> None:
        """Print a line on stderr."""
        if not self.quiet:
            print(printable(message), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def progress(self, description: str) -> Iterator[Progress]:
        """Show a bar with elapsed time, time to go and peak memory; without a terminal, print start and end only."""
        if not self.bars:
            start = time.monotonic()
            self.log(f"{description} ...")
            yield _silent
            self.log(f"{description}: {time.monotonic() - start:.1f} s, peak memory {peak_rss_bytes() / 1e9:.2f} GB")
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),  # of names in a model
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rss]}"),
        )
        with RichProgress(*columns, console=RichConsole(stderr=True)) as bars:
            task = bars.add_task(description, total=1.0, rss="")

            def update(fraction: float, what: str | None) -> None:
                text = printable(f"{description}: {what}" if what else description)
                bars.update(task, completed=fraction, description=text, rss=f"{peak_rss_bytes() / 1e9:.2f} GB")

            yield update
            bars.update(task, completed=1.0, description=description)


def _silent(fraction: float, description: str | None) -> None:
    """A progress that shows nothing."""
