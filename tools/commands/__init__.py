"""The verbs, discovered: a module here that defines ``COMMAND`` is one."""

from __future__ import annotations

import importlib
import pkgutil

from rankbook.tools.command import Command

ORDER = (
    *("methods", "quantize", "import", "eval", "export", "build", "parity", "generate", "serve"),
    *("bench", "inspect", "report", "push", "doctor", "demo"),
)
"""The order of the help text; verbs that are not listed follow by name."""


def discover() -> dict[str, Command]:
    """Return every verb by name, in the order in which they are used."""
    found: dict[str, Command] = {}
    for info in pkgutil.iter_modules(__path__):
        command = getattr(importlib.import_module(f"{__name__}.{info.name}"), "COMMAND", None)
        if isinstance(command, Command):
            found[command.name] = command
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else 99, item[0])))
