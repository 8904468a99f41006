"""Two builds of the native library in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rankbook.plugins import library
from rankbook.tools.dev import library_turns


class Decoder:
    """A model that remembers which library it was opened with, and which tokens it got."""

    opened: ClassVar[list[tuple[str, str, int]]] = []

    def __init__(self, path: Path, *, threads: int, kernels: str) -> None:
        self.opened.append((library.library("ort").name, kernels, threads))
        self.steps: list[int] = []

    def start(self, tokens: Any) -> None:
        assert tokens.shape == (1, 64)
        self.steps.clear()

    def step(self, token: int) -> None:
        self.steps.append(token)


def test_each_library_gets_a_session_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "opened", [])
    monkeypatch.setattr(library_turns, "OrtModel", Decoder)
    monkeypatch.setattr(library_turns, "_PAUSE", 0.0)
    given = tmp_path / "before.so", tmp_path / "after.so", tmp_path
    found = library_turns.compare(*given, kernels="native", threads=2, turns=3)
    assert Decoder.opened == [("before.so", "native", 2), ("after.so", "native", 2)]
    assert found.threads == 2
    assert found.speed > 0


def test_ratios_are_of_the_same_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # A turn that does not count, then one in which everything is slow and one in which everything is fast.
    times = {"before.so": iter([9.0, 8.0, 2.0]), "after.so": iter([9.0, 4.0, 1.0])}

    def subject(_model: Path, path: Path, _kernels: str, _threads: int) -> Callable[[], float]:
        return lambda: next(times[path.name])

    monkeypatch.setattr(library_turns, "_subject", subject)
    assert library_turns.main(["before.so", "after.so", "m", "--threads", "1", "--turns", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["speed"], told["uncertainty"]) == (2.0, 0.0)
    assert (told["milliseconds"], told["fastest"]) == ([5000.0, 2500.0], [2000.0, 1000.0])
