"""Models of a race: a path, with what runs it, or a peer with its path."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankbook.tools.bench.subject import ModelSubject, random_tokens
from rankbook.tools.errors import UsageError


def test_a_path_may_name_its_runtime(tmp_path: Path) -> None:
    assert ModelSubject.parse(f"{tmp_path}@bodies", "auto") == ModelSubject(tmp_path, "bodies")
    assert ModelSubject.parse(str(tmp_path), "native") == ModelSubject(tmp_path, "native")
    odd = tmp_path / "a@b"
    odd.mkdir()
    assert ModelSubject.parse(str(odd), "auto") == ModelSubject(odd, "auto")
    assert ModelSubject(tmp_path, "bodies").name == f"{tmp_path}@bodies"
    with pytest.raises(UsageError, match="does not exist; give models"):
        ModelSubject.parse(f"{tmp_path}/nothing", "auto")
    assert ModelSubject.parse(f"{tmp_path}@genai", "auto") == ModelSubject(tmp_path, "genai", is_peer=False)
    with pytest.raises(UsageError, match="genai runs on the CPU"):
        ModelSubject.on_device(f"{tmp_path}@genai")


def test_a_peer_is_named_before_its_path(tmp_path: Path) -> None:
    found = ModelSubject.parse_peer(f"genai={tmp_path}")
    assert found.is_peer
    assert found.name == f"genai={tmp_path}"
    for text, said in (
        (f"other={tmp_path}", "beside models give"),
        ("genai=nothing", "nothing does not exist; give an exported folder"),
    ):
        with pytest.raises(UsageError, match=said):
            ModelSubject.parse_peer(text)


def test_tokens_are_the_same_every_time() -> None:
    assert random_tokens(4).shape == (1, 4)
    assert (random_tokens(4) == random_tokens(4)).all()
