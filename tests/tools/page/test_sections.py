"""Sections show what runs hold, and name what they lack."""

from __future__ import annotations

import json
import shutil
from typing import Any

from rankbook.tools.page import sections
from rankbook.tools.page.page import make_page
from tests.tools.page.reports import LOST


def test_what_a_run_lacks_is_named(made):
    page = make_page([made / "onnx"], "one file", 2)
    missing = {section.title: " ".join(section.missing) for section in page.sections}
    for title, words in (
        ("Overview", "A: no checkpoint was given"),
        ("Accuracy", "A: no evaluation; `rankbook eval"),
        ("Error of each layer", "A: no checkpoint was given"),
        ("Spectrum of the error", "A: no checkpoint was given"),
        ("Codebooks", "A: no checkpoint was given"),
        ("Speed", "no measurement was given; `rankbook bench"),
        ("Parity", "A: not compared; `rankbook parity"),
    ):
        assert words in missing[title], title
    assert missing["Where the bytes go"] == ""


def test_a_run_without_a_source_says_so(made, tmp_path):
    shutil.copytree(made / "three", tmp_path / "q")
    manifest = json.loads((tmp_path / "q" / "rankbook.json").read_text())
    for entry in manifest["layers"].values():
        del entry["error_without_branch"]
    manifest["source"]["name"] = "/gone"
    (tmp_path / "q" / "rankbook.json").write_text(json.dumps(manifest))
    found: dict[str, Any] = {section.title: section for section in make_page([tmp_path / "q"], "t", 1).sections}
    assert "the source model, /gone, is not on this machine" in found["Spectrum of the error"].missing[0]
    assert "the branch alone" in found["Spectrum of the error"].blocks[0].caption
    assert "which an older version wrote" in found["Error of each layer"].missing[0]
    assert [s.title for s in make_page([tmp_path / "q"], "t", 0).sections if "Codebook" in s.title] == []


def test_a_perplexity_that_is_no_number_is_said_and_not_drawn(made, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps({**LOST, "model": str(made / "four"), "perplexity": None}))
    section: Any = sections.accuracy(make_page([made / "four", tmp_path / "e.json"], "t", 0).collection)
    assert [type(block).__name__ for block in section.blocks] == ["Table"]
    assert "not finite" in section.blocks[0].rows[0]


def test_what_may_not_be_comparable_is_said(made, tmp_path):
    """Texts of one name, unquantized models of several perplexities, and rounding that the model does not ask for."""
    for name, text, base, flags in (("a", "x/t.txt", 5.0, {}), ("b", "y/t.txt", 6.0, {"kv-bits": 4, "chat": False})):
        report = {**LOST, "model": str(made / "four"), "text": text, "reference_perplexity": base, "flags": flags}
        (tmp_path / f"{name}.json").write_text(json.dumps({**report, "kernels": "PyTorch"}))
    page = make_page([made / "four", tmp_path], "t", 0)
    section: Any = sections.accuracy(page.collection)
    assert section.missing == [
        "on t.txt, 3 tokens: x/t.txt, y/t.txt are taken for one text, by their name",
        "on t.txt, 3 tokens: the unquantized models have perplexities of 5, 6, so that the runs are of several models",
    ]
    assert "unquantized models" in section.blocks[0].svg
    assert [row[2] for row in section.blocks[1].rows] == ["PyTorch", "PyTorch --kv-bits 4"]
    overview: Any = sections.overview(page.collection).blocks[0]
    assert overview.rows[0][overview.columns.index("evaluated on")] == "t.txt, 3 tokens"
