"""What one verb of the command line is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankbook.tools.report import Table


@dataclass(frozen=True)
class Outcome:
    """What a verb returns.

    Attributes:
        report: What ``--json`` prints: a mapping or a dataclass.
        tables: What is printed otherwise.
        text: Lines printed after the tables.
        passed: False makes the exit code 1.
        config_folder: Where the resolved configuration is written, or None.
    """

    report: Any
    tables: Sequence[Table] = ()
    text: str = ""
    passed: bool = True
    config_folder: Path | None = None


class Flags:
    """Collects the flags of one verb; a configuration file may set the same ones by name."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser
        self.actions: dict[str, argparse.Action] = {}
        self.defaults: dict[str, Any] = {}
        self.required: dict[str, str] = {}

    def add(self, *names: str, text: str, default: Any = None, required: bool = False, **options: Any) -> None:
        """Add a flag or a positional argument (which a configuration file may then supply).

        Args:
            names: As `argparse.ArgumentParser.add_argument` takes them.
            text: One phrase; the default is appended to it.
            default: Value without flag and configuration entry.
            required: Whether flag or configuration must set it.
            options: Passed on to argparse.
        """
        if not names[0].startswith("-"):
            options.setdefault("nargs", "?")
        elif required:
            text += " (required)"
        if default not in (None, False, (), []):
            shown = " ".join(map(str, default)) if isinstance(default, (tuple, list)) else default
            text += f" (default: {shown})"
        action = self._parser.add_argument(*names, help=text.replace("%", "%%"), default=argparse.SUPPRESS, **options)
        self.actions[action.dest] = action
        self.defaults[action.dest] = default
        if required:
            self.required[action.dest] = names[0] if names[0].startswith("-") else str(action.metavar or action.dest)


@dataclass(frozen=True)
class Command:
    """One verb: a module in `rankbook.tools.commands` that ends in ``COMMAND = Command(...)``.

    Attributes:
        name: The verb.
        summary: One line for the list of verbs.
        example: A command line that works, shown by ``--help``.
        add_flags: Declares the flags.
        run: Does the work; gets the resolved values as attributes.
    """

    name: str
    summary: str
    example: str
    add_flags: Callable[[Flags], None]
    run: Callable[[argparse.Namespace], Outcome]
