"""Flags and configuration keys made from the fields of a verb's options (see `rankbook.calibration.option`)."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from rankbook.calibration import option
from rankbook.calibration.option import Described, listed
from rankbook.tools.errors import UsageError

_ORDER = (option.WHERE, option.WHAT, option.EFFORT, "")
_LAST = (option.ADVANCED, option.COMMON)
_NUMBERS = {int: "whole number", float: "number"}


@dataclass(frozen=True)
class Flag:
    """One option on the command line and in configuration files.

    Attributes:
        option: The field that it comes from.
        flags: Its spellings, the main one first; none for a positional argument.
    """

    option: Described
    flags: tuple[str, ...]

    @classmethod
    def of(cls, item: Described) -> Flag:
        """Make the flag of an option."""
        if item.about.positional:
            return cls(item, ())
        long = [name for name in item.about.flags if name.startswith("--")]
        return cls(item, item.about.flags if long else (*item.about.flags, f"--{item.name.replace('_', '-')}"))

    @property
    def shown(self) -> str:
        """What errors call it: ``--flag``, or the placeholder of an argument."""
        if not self.flags:
            return self.option.about.metavar or self.option.name.upper()
        return self.flags[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """Its names in a configuration file; the first one is written."""
        long = [name[2:].replace("-", "_") for name in self.flags if name.startswith("--")]
        return tuple(dict.fromkeys([*long, self.option.name]))

    @property
    def switch(self) -> bool:
        """Whether it is given without a value."""
        return self.option.kind is bool

    def lacks(self, given: Mapping[str, Any]) -> bool:
        """Return whether it is a flag that must be given, and is not."""
        return bool(self.flags) and self.option.default is MISSING and self.option.name not in given

    def parse(self, text: str) -> Any:
        """Turn the text of one value into the value.

        Raises:
            argparse.ArgumentTypeError: It is not allowed.
        """
        about, kind = self.option.about, self.option.kind
        if text == argparse.SUPPRESS:  # argparse passes the placeholder of an absent positional argument through
            return text
        try:
            value = about.parse(text) if about.parse else _pair(text) if kind is dict else kind(text)
        except ValueError as error:
            said = f"{text!r} is not a {_NUMBERS[kind]}" if kind in _NUMBERS and not about.parse else str(error)
            raise argparse.ArgumentTypeError(said) from None
        if about.choices is not None and value not in about.choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; choose one of {listed(text, about.choices)}")
        return value

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Add it to a parser; what is not given stays out of the result."""
        item, about = self.option, self.option.about
        help_text = self.help().replace("%", "%%")
        if self.switch:
            action: Any = "store_true" if item.default is False else argparse.BooleanOptionalAction
            parser.add_argument(*self.flags, dest=item.name, action=action, default=argparse.SUPPRESS, help=help_text)
            return
        settings: dict[str, Any] = {"type": self.parse, "default": argparse.SUPPRESS, "help": help_text}
        settings["metavar"] = self.placeholder()
        if about.positional:
            parser.add_argument(item.name, nargs="*" if item.many else "?", **settings)
        elif item.many:
            # A flag that is repeated adds to what it said before.
            parser.add_argument(*self.flags, dest=item.name, nargs="+", action="extend", **settings)
        else:
            parser.add_argument(*self.flags, dest=item.name, **settings)

    def placeholder(self) -> str:
        """What stands for a value."""
        about = self.option.about
        if about.metavar is None and about.choices is not None:
            return f"{{{','.join(map(str, about.choices))}}}"
        return about.metavar or self.option.name.upper()

    def help(self) -> str:
        """Return the phrase of the option with its default."""
        if self.option.default is MISSING:
            return f"{self.option.about.text} (required)"
        default = self.option.shown_default()
        return self.option.about.text + (f" (default: {default})" if default else "")

    def convert(self, value: Any, source: str) -> Any:
        """Turn a value of a configuration file, which is not None, into that of the option.

        Raises:
            UsageError: It is not one that the option takes.
        """
        item = self.option
        if item.kind is dict and isinstance(value, Mapping):
            return {str(name).replace("-", "_"): one for name, one in value.items()}
        if item.many:
            items = value if isinstance(value, (list, tuple)) else [value]
            return self.collected([self._convert_one(one, source) for one in items])
        if self.switch:
            if not isinstance(value, bool):
                raise UsageError(f"{source} is {value!r}; give true or false")
            return value
        return self._convert_one(value, source)

    def _convert_one(self, value: Any, source: str) -> Any:
        if isinstance(value, (dict, list)):
            raise UsageError(f"{source} is a {type(value).__name__}; give one value")
        if isinstance(value, bool) or value is None:  # YAML reads yes, no, on, off and ~ so
            raise UsageError(f"{source} is {value!r}; give a value, in quotes if it is meant as text")
        try:
            return self.parse(str(value))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{source} is {value!r}: {error}") from None

    def collected(self, values: Any) -> Any:
        """Turn the list of a repeated value into what the field holds."""
        return (dict if self.option.kind is dict else tuple)(values) if self.option.many else values


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} has no value; write KEY=VALUE")
    try:
        return name.replace("-", "_"), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"{text!r}: the value is not valid YAML; put it into quotes") from None


def flags_of(options: type) -> dict[str, Flag]:
    """Return the flags of a dataclass of options by the names of its fields."""
    return {item.name: Flag.of(item) for item in option.described(options)}


def grouped(flags: Iterable[Flag]) -> dict[str, list[Flag]]:
    """Return flags by group, in the order of ``--help``: arguments first within a group, required ones next."""
    found: dict[str, list[Flag]] = {title: [] for title in _ORDER}
    for flag in flags:
        found.setdefault(flag.option.about.group, []).append(flag)
    for title in _LAST:
        if title in found:
            found[title] = found.pop(title)

    def place(flag: Flag) -> tuple[bool, bool]:
        return not flag.option.about.positional, flag.option.default is not MISSING

    return {title: sorted(items, key=place) for title, items in found.items() if items}


def add_flags(parser: argparse.ArgumentParser, flags: Mapping[str, Flag]) -> None:
    """Add flags to the parser of a verb, a titled group for each of theirs."""
    for title, items in grouped(flags.values()).items():
        group = parser.add_argument_group(title or "options")
        if title == option.COMMON:
            group.add_argument("-h", "--help", action="help", help="show this text")
        for flag in items:
            flag.add_to(group)


def usage(verb: str, flags: Mapping[str, Flag]) -> str:
    """Return one line that shows what must be given."""
    words = [f"rankbook {verb}"]
    for flag in (flag for items in grouped(flags.values()).values() for flag in items):
        optional = flag.option.default is not MISSING
        if flag.option.about.positional:
            words.append(f"[{flag.shown} ...]" if flag.option.many else f"[{flag.shown}]" if optional else flag.shown)
        elif not optional:
            words.append(f"{flag.shown} {flag.placeholder()}")
    return " ".join([*words, "[flags]"])


def make(kind: type[Any], verb: str, flags: Mapping[str, Flag], values: Mapping[str, Any]) -> Any:
    """Make the options of a verb from what was given.

    Raises:
        UsageError: A required option is missing.
        ValueError: The options refuse a value.
    """
    values = kind.completed(values) if hasattr(kind, "completed") else values
    missing = [
        flag.shown for name, flag in flags.items() if flag.option.default is MISSING and values.get(name) is None
    ]
    if missing:
        is_ = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{' and '.join(missing)} {is_} missing; `rankbook {verb} --help` shows an example")
    return kind(**values)


def absolute(text: str) -> Path:
    """Return the path without links and from the root, so that it means the same from every folder."""
    return Path(text).resolve()
