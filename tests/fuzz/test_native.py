"""Damaged models of one node in the native library; `test_native_sanitizers.py` runs this under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.native import NATIVE
from tests.fuzz.runner import run
from tests.fuzz.targets import TARGETS
from tests.ops.runners import built

pytestmark = built
INPUTS = 30
"""For each model."""


@pytest.mark.parametrize("name", NATIVE)
def test_damaged_nodes_are_computed_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, name, NATIVE[name])
    result = run(name, seconds=300, inputs=INPUTS)
    assert result.failures == []
    assert result.inputs == INPUTS
    assert 0 < result.refused < INPUTS


def test_valid_nodes_are_computed(tmp_path: Path) -> None:
    for name, target in NATIVE.items():
        folder = tmp_path / name
        folder.mkdir()
        target.make(folder)
        target.load(folder)
