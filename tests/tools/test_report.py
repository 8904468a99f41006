"""Reports as JSON, Markdown and terminal tables."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankbook.tools.report import Table, megabytes, plain, printable


@dataclass(frozen=True)
class Inner:
    path: Path
    values: tuple[float, ...]


def test_plain_turns_everything_into_json_values():
    value = {"a": Inner(Path("x/y"), (1.0, float("nan"), float("inf"))), "b": np.float32(0.5), "c": {3}}
    assert plain(value) == {"a": {"path": "x/y", "values": [1.0, None, None]}, "b": 0.5, "c": [3]}


def test_a_table_is_the_same_in_markdown_and_on_the_terminal():
    table = Table("title", ("name", "value"), [("a", 1.23456), ("b", None), ("c", True)])
    assert table.markdown() == "| name | value |\n|---|---|\n| a | 1.235 |\n| b |  |\n| c | yes |"
    stream = io.StringIO()
    table.show(stream)
    for word in ("title", "name", "1.235", "yes"):
        assert word in stream.getvalue()


def test_sizes():
    assert megabytes(512) == "512 B"
    assert megabytes(2_500_000) == "2.50 MB"


def test_names_give_a_terminal_no_commands():
    hostile = "a\x1b[2J\x07\u202eb\ud800\x9bc"
    assert printable(hostile) == r"a\x1b[2J\x07\u202eb\ud800\x9bc"
    assert printable("línea 1\n\tlinea 2 漢字") == "línea 1\n\tlinea 2 漢字"
    stream = io.StringIO()
    Table("title", ("name",), [(hostile,)]).show(stream)
    assert "\x1b" not in stream.getvalue()
    assert r"\x1b[2J" in stream.getvalue()
