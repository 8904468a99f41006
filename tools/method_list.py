"""The methods and their options, as ``rankbook methods`` and ``rankbook quantize --method M --help`` show them."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, dataclass
from typing import Any

from rankbook.calibration.driver.options import QuantizeOptions, renamed
from rankbook.calibration.methods import METHODS, Method
from rankbook.calibration.option import described, near
from rankbook.tools.errors import UsageError
from rankbook.tools.flags import flags_of


@dataclass(frozen=True)
class MethodOption:
    """One option of a method.

    Attributes:
        name: What ``--method-option`` takes.
        default: What a run takes where nothing is given: its own default if it has one, else the method's.
        text: What it means.
        choices: Values allowed; empty where it is not a choice.
        flag: The flag of ``rankbook quantize`` that sets it; empty if only ``--method-option`` does.
    """

    name: str
    default: Any
    text: str
    choices: tuple[Any, ...]
    flag: str

    def meaning(self) -> str:
        """Return the text with the choices."""
        return f"{self.text}: {', '.join(map(str, self.choices))}" if self.choices else self.text


@dataclass(frozen=True)
class MethodEntry:
    """One method: its name, what it does, where it comes from, and its options."""

    name: str
    summary: str
    source: str
    options: tuple[MethodOption, ...]


def find(name: str) -> MethodEntry:
    """Return the entry of a method.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}{near(name, METHODS)}")
    return _entry(METHODS[name])


def entries() -> list[MethodEntry]:
    """Return every method by name."""
    return [_entry(METHODS[name]) for name in sorted(METHODS)]


def _entry(method: Method) -> MethodEntry:
    flags = {renamed(name): flag.shown for name, flag in flags_of(QuantizeOptions).items()}
    run = {renamed(item.name): item.default for item in described(QuantizeOptions) if item.default is not None}
    options = tuple(
        MethodOption(
            item.name,
            None if item.default is MISSING else run.get(item.name, item.default),
            item.about.text,
            item.about.choices or (),
            flags.get(item.name, ""),
        )
        for item in described(method.config_type)
    )
    return MethodEntry(method.name, method.summary, method.source, options)


def help_text(entry: MethodEntry) -> str:
    """Return the end of ``rankbook quantize --method M --help``."""
    own = [item for item in entry.options if not item.flag]
    width = max((len(item.name) for item in own), default=0) + 2
    lines = [f"method {entry.name}: {entry.summary}" + (f" ({entry.source})" if entry.source else "")]
    read = [f"{item.flag} {item.default}" for item in entry.options if item.flag]
    text = f"flags above that it reads, with its defaults: {', '.join(read)}"
    lines += textwrap.wrap(text, 98, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    if own:
        lines.append("  further options (--method-option KEY=VALUE ...):")
    for item in own:
        text = f"{item.meaning()} (default: {item.default})"
        first, *rest = textwrap.wrap(text, 92 - width)
        lines += [f"    {item.name:{width}}{first}", *(" " * (4 + width) + line for line in rest)]
    return "\n".join(lines)
