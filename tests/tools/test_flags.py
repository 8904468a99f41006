"""Flags are made from fields: names, values, help and the line of usage."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.option import ADVANCED, COMMON, WHERE, Options, argument, option, required
from rankbook.tools import flags
from rankbook.tools.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Verb(Options):
    """Options of a verb."""

    seed: int = option(0, "seed", group=COMMON)
    model: str = argument("the model", metavar="MODEL", group=WHERE)
    output: Path = required("the folder", metavar="DIR", flags=("-o", "--output"), group=WHERE)
    names: tuple[str, ...] = option((), "names", metavar="NAME")
    quiet: bool = option(False, "say nothing")
    search: bool | None = option(None, "search", group=ADVANCED)
    more: Mapping[str, Any] = option({}, "pairs", flags=("--option",))


FLAGS = flags.flags_of(Verb)


def parsed(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    flags.add_flags(parser, FLAGS)
    given = vars(parser.parse_args(words))
    return {name: FLAGS[name].collected(value) for name, value in given.items() if value != argparse.SUPPRESS}


def test_what_is_given_becomes_what_the_fields_hold() -> None:
    given = parsed("m", "-o", "out", "--names", "a", "b", "--names", "c", "--option", "x-y=3", "--no-search", "--quiet")
    assert given == {
        **{"model": "m", "output": Path("out"), "names": ("a", "b", "c"), "quiet": True},
        **{"search": False, "more": {"x_y": 3}},
    }
    assert flags.make(Verb, "verb", FLAGS, given) == Verb(**given)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match=r"MODEL and -o are missing; `rankbook verb --help`"):
        flags.make(Verb, "verb", FLAGS, parsed())


def test_groups_come_in_order_and_arguments_first() -> None:
    groups = flags.grouped(FLAGS.values())
    assert list(groups) == [WHERE, "", ADVANCED, COMMON]
    assert [flag.shown for flag in groups[WHERE]] == ["MODEL", "-o"]
    assert flags.usage("verb", FLAGS) == "rankbook verb MODEL -o DIR [flags]"


def test_keys_of_a_configuration_are_the_long_spellings() -> None:
    assert FLAGS["output"].keys == ("output",)
    assert FLAGS["more"].keys == ("option", "more")
    assert FLAGS["more"].convert({"a-b": 1}, "file") == {"a_b": 1}
    with pytest.raises(UsageError, match="quiet is 1; give true or false"):
        FLAGS["quiet"].convert(1, "quiet")
