"""The sweep over model families: what it notes, what it writes, and that the families most used pass it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from rankbook.tools import errors
from rankbook.tools.dev import families
from rankbook.tools.dev.families import Row
from rankbook.tools.dev.family_models import FAMILIES


def test_an_unknown_family_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--families", "llama,nonsense"]) == errors.USAGE
    assert "unknown families nonsense; known are llama" in capsys.readouterr().err


def test_the_document_counts_what_is_served_refused_and_wrong() -> None:
    good = Row("llama", 1.0, "", 0.0, {"standard": 1e-6, "ort": 1e-6}, {"standard": True, "ort": True})
    wrong = Row("mixtral", 1.0, "", 0.0, {"standard": 0.3}, {"standard": False}, {"standard": "parity fails"})
    refused = Row("mamba", 0.9, "layers keep a state", 0.0)
    assert (good.served, wrong.wrong, refused.served or refused.wrong) == (True, True, False)
    text = families.document({row.family: row for row in (good, wrong, refused)})
    assert "Of 3 families 1 pass" in text
    assert "1 are refused" in text
    assert "1 give wrong numbers" in text
    assert "Not run: `qwen2`, `qwen3`," in text
    assert "| `mamba` | 90% | same | not exported | not exported | not exported | layers keep a state |" in text


def test_a_family_that_takes_too_long_is_ended_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(families, "_load", lambda: None)
    monkeypatch.setattr(families, "sweep", lambda *_: time.sleep(60))
    families.run(["llama"], tmp_path, 0.2)
    assert asdict(families._read(tmp_path / "llama" / "row.json"))["reasons"] == {"run": "ended after 0.2 s"}


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "deepseek_v3", "gpt2"])
def test_families_that_are_used_most_pass(family: str, tmp_path: Path) -> None:
    exports = ("standard", "static") if family == "deepseek_v3" else ("standard",)
    row = families.sweep(family, tmp_path, exports)
    assert family in FAMILIES
    assert row.reasons == {}
    assert row.passed == dict.fromkeys(exports, True)
    assert (row.reload or 0) < 1e-5
    assert (row.packed or 0) > 0.95
