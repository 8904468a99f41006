"""Texts are read part by part, whatever file they are in; their parts and samples are the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.text import pieces, plain_text, read_text, sample_pieces


def whole(path: Path) -> str:
    return "".join(read_text(path).parts(None))


def test_rows_of_json_are_joined_by_an_empty_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": "two"}]))
    assert whole(tmp_path / "a.jsonl") == whole(tmp_path / "a.json") == "one\n\ntwo"


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-8-sig"))
    assert whole(tmp_path / "a.txt") == "text"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("a.txt", b"a\0b", "holds zero bytes"),
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 3000, "line 1 is nested too deeply"),
        ("a.jsonl", b'{"body": 1}', "line 1 has no field 'text'"),
        ("a.jsonl", b'{"messages": []}', "--calib-chat"),
        ("a.pdf", b"", "is a .pdf file, not text"),
    ],
)
def test_what_is_no_text_is_said_before_a_model_is_loaded(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_text(tmp_path / name)


def test_a_list_that_is_nested_too_deeply_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 3000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is nested too deeply"):
        whole(tmp_path / "a.json")


def test_pieces_are_the_text_and_end_between_words() -> None:
    text = " ".join(f"word{i}" for i in range(200))
    found = list(pieces([text[:300], text[300:]], 100))
    assert "".join(found) == text
    assert all(len(piece) <= 100 for piece in found)
    assert all(piece.startswith(" ") for piece in found[1:])


def test_a_sample_keeps_order_and_says_how_many_there_are() -> None:
    found, count = sample_pieces(map(str, range(1000)), 10, seed=3)
    assert count == 1000
    assert len(found) == 10
    assert [int(piece) for piece in found] == sorted(int(piece) for piece in found)
    assert sample_pieces(iter("abc"), 10, seed=3) == (["a", "b", "c"], 3)
    assert list(plain_text("x").parts(None)) == ["x"]
