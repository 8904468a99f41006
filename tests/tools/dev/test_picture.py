"""The picture of the README shows what the table of docs/accuracy.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankbook.tools.dev import picture


def test_the_points_are_those_of_the_table() -> None:
    markdown = picture.TABLE.read_text()
    found = picture.points(markdown)
    assert found["LCQ rank 1"] == [(2.339, 43.08), (3.339, 31.7), (4.256, 28.98)]
    assert [len(given) for given in found.values()] == [3, 3, 3]
    assert picture.original(markdown) == 28.48
    with pytest.raises(ValueError, match="no line of LCQ rank 1"):
        picture.points(markdown.replace("LCQ rank 1", "LCQ"))


def test_it_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture.draw({name: [(2.0, 50.0), (3.0, 40.0)] for name in picture.CURVES}, 30.0, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for name in ("LCQ rank 1", "AutoRound 0.16.1", "GPTQ", "original model"):
        assert name in text
        assert name in picture.PICTURE.read_text()
