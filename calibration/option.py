"""Options as fields of dataclasses: what an option means stands once, in its field.

`option`, `required` and `argument` make such fields. The command line (`rankbook.tools.flags`), the configuration
files, the help texts, the tables of the documents and the checks of `Options` read them. Nothing that costs time is
imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import MISSING, dataclass, field
from typing import Any

WHERE, WHAT, EFFORT = "where (model, texts, folders)", "what is stored", "how hard"
ADVANCED, COMMON = "advanced", "every verb"
"""Titles of groups of options; the last two end the help."""


@dataclass(frozen=True)
class About:
    """What a field means beyond its name, its type and its default.

    Attributes:
        text: One phrase.
        choices: The values allowed, or None.
        group: Title under which ``--help`` lists it; empty for the list without a title of its own.
        metavar: What stands for its value.
        flags: Its spellings on the command line where they differ from ``--field-name``, the main one first.
        positional: Whether it has no flag, but a place.
        least: Smallest number allowed, or None.
        parse: Turns the text of a value into the value, where the type of the field does not say how.
    """

    text: str
    choices: tuple[Any, ...] | None = None
    group: str = ""
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    positional: bool = False
    least: float | None = None
    parse: Callable[[str], Any] | None = None


def option(default: Any, text: str, **about: Any) -> Any:
    """Return a field with a default; ``about`` as in `About`. Mutable defaults are not allowed, empty mappings are."""
    metadata = {"about": About(text, **about)}
    return (
        field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)
    )


def required(text: str, **about: Any) -> Any:
    """Return a field without a default: a flag or a configuration file must set it."""
    return field(metadata={"about": About(text, **about)})


def argument(text: str, default: Any = MISSING, **about: Any) -> Any:
    """Return a field that is a positional argument, which a configuration file may supply too."""
    return field(default=default, metadata={"about": About(text, positional=True, **about)})


@dataclass(frozen=True)
class Described:
    """One option of a dataclass.

    Attributes:
        name: Of the field.
        default: `dataclasses.MISSING` where there is none.
        kind: The type of one value.
        many: Whether it holds a tuple of them; for `dict`, any number of pairs.
        about: The rest.
    """

    name: str
    default: Any
    kind: Any
    many: bool
    about: About

    def shown_default(self) -> str:
        """Return the default for people; empty where nothing is set."""
        if self.default is MISSING or self.default is None or self.default is False or self.default in ((), {}):
            return ""
        return " ".join(map(str, self.default)) if self.many else str(self.default)


def described(options: type) -> Iterator[Described]:
    """Yield the options of a dataclass in the order of its fields; fields that are no options are left out."""
    hints = typing.get_type_hints(options)
    for item in dataclasses.fields(options):
        if (about := item.metadata.get("about")) is None:
            continue
        default = {} if item.default_factory is not MISSING else item.default
        kinds = [kind for kind in typing.get_args(hints[item.name]) if kind is not type(None)]
        if typing.get_origin(hints[item.name]) is tuple:
            yield Described(item.name, default, kinds[0], True, about)
        elif isinstance(default, dict):
            yield Described(item.name, default, dict, True, about)
        else:
            yield Described(item.name, default, kinds[0] if kinds else hints[item.name], False, about)


@dataclass(frozen=True)
class Options:
    """Base of dataclasses of options: choices and bounds that their fields name hold from construction on.

    Raises:
        ValueError: A value is not allowed; the message names those that are.
    """

    def __post_init__(self) -> None:
        for item in described(type(self)):
            value = getattr(self, item.name)
            for one in value if item.many else (value,):
                if one is None and item.default is None:
                    continue
                if item.about.choices is not None:
                    choose(item.name, one, item.about.choices)
                if isinstance(one, float) and not math.isfinite(one):  # NaN is on neither side of a bound
                    raise ValueError(f"{item.name} is {one}; give a finite number")
                if item.about.least is not None and one < item.about.least:
                    raise ValueError(f"{item.name} is {one}; give at least {item.about.least}")


@dataclass(frozen=True, kw_only=True)
class Seeded(Options):
    """Options of what draws random values."""

    seed: int = option(0, "random seed", metavar="N", group=COMMON)


@dataclass(frozen=True, kw_only=True)
class Threaded(Options):
    """Options of what computes on the CPU."""

    threads: int | None = option(None, "CPU threads to use; default: all cores", metavar="N", least=0, group=COMMON)


def choose(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise a `ValueError` unless ``value`` is among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not supported; choose one of {listed(value, allowed)}")


def listed(value: object, allowed: Iterable[object]) -> str:
    """Return the values allowed, and those that ``value`` may have been meant for."""
    names = [str(item) for item in allowed]
    return ", ".join(names) + near(str(value), names)


def near(name: str, known: Iterable[str]) -> str:
    """Return a phrase that names what may have been meant; empty if nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def part(options: Any, kind: type[Any]) -> Any:
    """Return the options of the base class ``kind`` that ``options``, of a class derived from it, holds."""
    return kind(**{item.name: getattr(options, item.name) for item in dataclasses.fields(kind)})
