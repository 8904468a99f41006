"""A short run of the fuzzer over every loader; `make fuzz` runs it for as long as one likes."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.runner import LONGEST, attempt, run
from tests.fuzz.targets import TARGETS, Target

INPUTS = 40
"""For each loader."""


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused_with_a_sentence(name: str) -> None:
    result = run(name, seconds=300, inputs=INPUTS)
    assert result.failures == []
    assert result.inputs == INPUTS


def test_the_valid_files_are_read(tmp_path) -> None:
    for name, target in TARGETS.items():
        folder = tmp_path / name
        folder.mkdir()
        target.make(folder)
        target.load(folder)


def test_what_is_wrong_with_a_loader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder):
        (folder / "a.json").write_text('{"a": [1, 2, {"b": "c"}]}')

    def crash(_folder):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)  # silently, unlike what a real crash does

    def undeclared(_folder):
        raise KeyError("a")

    def greedy(_folder):
        bytearray(200 << 20)[:: 1 << 12] = b"x" * (200 << 8)

    def refuses(_folder):
        raise ValueError("a is missing; write the file again")

    for load, message in ((undeclared, "KeyError"), (greedy, "memory"), (crash, "ended with -")):
        monkeypatch.setitem(TARGETS, "wrong", Target(make, load))
        result = run("wrong", seconds=60, inputs=1)
        assert len(result.failures) == 1, message
        assert message in result.failures[0]
    monkeypatch.setitem(TARGETS, "right", Target(make, refuses))
    refused, seconds, said = attempt("right", 0)
    assert refused
    assert seconds < LONGEST
    assert said == ""


@pytest.mark.parametrize("name", ["a.json", "a.onnx", "a.safetensors", "a.bin"])
def test_a_number_always_gives_the_same_change_of_any_content(name: str) -> None:
    for content in (b"", b'{"a": {"b": [1, 2.5, null]}}', bytes(range(256))):
        for number in range(50):
            first, second = (mutated(content, name, random.Random(number)) for _ in range(2))
            assert first == second
