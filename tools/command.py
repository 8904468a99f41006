"""What one verb of the command line is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankbook.calibration.option import COMMON, Seeded, Threaded, option
from rankbook.tools.report import Table


@dataclass(frozen=True, kw_only=True)
class Common(Seeded, Threaded):
    """Options of every verb; those of one verb derive from them."""

    config: Path | None = option(None, "YAML or TOML file with values for these flags", metavar="FILE", group=COMMON)
    json: bool = option(False, "print the report as JSON on stdout", group=COMMON)
    quiet: bool = option(False, "no progress and no log lines on stderr", group=COMMON)
    debug: bool = option(False, "show tracebacks (also RANKBOOK_DEBUG=1)", group=COMMON)


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


@dataclass(frozen=True)
class Command:
    """One verb: a module in `rankbook.tools.commands` that ends in ``COMMAND = Command(...)``.

    Attributes:
        name: The verb.
        summary: One line for the list of verbs.
        example: A command line that works, shown by ``--help``.
        options: Frozen dataclass, derived from `Common`: flags, configuration keys and help come from its fields.
        run: Does the work.
        more_help: Paragraph for the end of ``--help``, which may depend on the arguments given beside it.
    """

    name: str
    summary: str
    example: str
    options: type[Common]
    run: Callable[[Any], Outcome]
    more_help: Callable[[Sequence[str]], str] = lambda _: ""
