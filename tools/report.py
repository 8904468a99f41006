"""Reports as JSON, as a terminal table and as Markdown."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True)
class Table:
    """A titled table: every row has one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[object]]

    def markdown(self) -> str:
        """Return the table as GitHub Markdown."""
        lines = [f"| {' | '.join(self.columns)} |", f"|{'---|' * len(self.columns)}"]
        lines += [f"| {' | '.join(cell(value) for value in row)} |" for row in self.rows]
        return "\n".join(lines)

    def show(self, file: TextIO) -> None:
        """Print the table with rich; columns of numbers are aligned to the right."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title or None, title_justify="left", title_style="bold", header_style="bold")
        for index, name in enumerate(self.columns):
            numeric = any(isinstance(row[index], (int, float)) for row in self.rows)
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(cell(value) for value in row))
        # Pipes and files have no width; 80 columns would fold every layer name.
        width = None if file.isatty() else 160
        Console(file=file, width=width, highlight=False, markup=False).print(table)


_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys instead of showing it, or cannot show: control characters, directions, halves of characters."""


def printable(text: str) -> str:
    """Return text as a terminal may be given it: names in files from strangers may hold commands for it."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cell(value: object) -> str:
    """Format one cell: four significant digits for floats, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


def plain(value: Any) -> Any:
    """Turn dataclasses, paths, numpy scalars and tuples into what JSON holds; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """Return a report as indented JSON."""
    return json.dumps(plain(value), indent=2)


def megabytes(size: float) -> str:
    """Format a size in bytes."""
    return f"{size / 1e6:.2f} MB" if size >= 1e4 else f"{int(size)} B"


def duration(seconds: float) -> str:
    """Format a time span to one digit more than it is known."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
