"""JSON files from outside: what is wrong is named, whatever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankbook.calibration.schema import SchemaError, mismatch, read_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, not a JSON object"),
        (b"{", "cannot be read: Expecting"),
        (b"[" * 3000, "cannot be read: it is nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read"),  # more digits than Python converts
        (b"\xff", "cannot be read: 'utf-8'"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_what_is_no_object_is_said_with_the_file_and_the_advice(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "facts.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SchemaError, match=rf"facts\.json {message}.*; copy it again"):
        read_object(path, "copy it again")


@dataclass
class Inner:
    path: str
    sizes: dict[str, tuple[int, ...]]


@dataclass
class Outer:
    inner: Inner
    share: float
    on: bool
    name: str | None


RIGHT: dict[str, Any] = {"inner": {"path": "x", "sizes": {"a": [1, 2]}}, "share": 1, "on": True, "name": None}


def test_values_that_fit_and_unknown_or_missing_entries_pass() -> None:
    assert mismatch(RIGHT, Outer, "f") == ""
    assert mismatch({"share": 0.5, "more": []}, Outer, "f") == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": []}, "f.inner is list, not dict"),
        ({"inner": {"path": 3}}, "f.inner.path is 3, not str"),
        ({"inner": {"sizes": {"a": [1, True]}}}, "f.inner.sizes.a.1 is True, not int"),
        ({"inner": {"sizes": {"a": 1}}}, "f.inner.sizes.a is 1, not tuple"),
        ({"share": True}, "f.share is True, not float"),
        ({"share": "9" * 500}, f"f.share is '{'9' * 59}, not float"),
        ({"on": 1}, "f.on is 1, not bool"),
        ({"name": 1}, "f.name is 1, not str | None"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change: dict[str, Any], message: str) -> None:
    assert mismatch({**RIGHT, **change}, Outer, "f") == message
