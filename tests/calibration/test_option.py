"""Options as fields: checks hold from construction on, and whoever asks gets each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import pytest

from rankbook.calibration.option import Options, argument, described, near, option, part, required


@dataclass(frozen=True)
class Plain(Options):
    """Some options."""

    bits: int = option(4, "width", choices=(2, 4))
    names: tuple[str, ...] = option((), "names", choices=("a", "b"))
    rank: int | None = option(None, "rank", least=1)
    more: Mapping[str, Any] = option({}, "pairs")
    other: int = 7


@dataclass(frozen=True, kw_only=True)
class Verb(Plain):
    """Options of a verb."""

    model: str = argument("what", metavar="MODEL")
    output: str = required("where")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bits": 3}, "bits 3 is not supported; choose one of 2, 4"),
        ({"names": ("a", "c")}, "names 'c' is not supported; choose one of a, b"),
        ({"rank": 0}, "rank is 0; give at least 1"),
    ],
)
def test_choices_and_bounds_hold_at_construction(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plain(**values)


def test_none_is_a_value_only_where_it_is_the_default() -> None:
    assert Plain(rank=None).rank is None
    with pytest.raises(ValueError, match="bits None"):
        Plain(bits=None)  # type: ignore[arg-type]


def test_described_says_type_default_and_how_many() -> None:
    found = {item.name: item for item in described(Verb)}
    assert set(found) == {"bits", "names", "rank", "more", "model", "output"}  # `other` is no option
    assert (found["bits"].kind, found["bits"].many, found["bits"].shown_default()) == (int, False, "4")
    assert (found["names"].kind, found["names"].many, found["names"].shown_default()) == (str, True, "")
    assert (found["rank"].kind, found["more"].kind, found["more"].many) == (int, dict, True)
    assert found["output"].default is MISSING
    assert found["model"].about.positional


def test_part_takes_the_options_of_the_base() -> None:
    assert part(Verb(model="m", output="o", bits=2), Plain) == Plain(bits=2)


def test_near_names_what_may_have_been_meant() -> None:
    assert near("bit", ["bits", "rank"]) == "; did you mean bits?"
    assert near("zzz", ["bits"]) == ""
