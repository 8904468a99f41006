"""The sweep over model families: what it notes, what it writes, and that the families most used pass it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from rankbook.tools import errors
from rankbook.tools.dev import families, family_page
from rankbook.tools.dev.docs import ROOT
from rankbook.tools.dev.family_models import FAMILIES, FURTHER, MOST_USED
from rankbook.tools.dev.family_page import Row
from tests import tiny


def test_an_unknown_family_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert families.main(["--families", "llama,nonsense"]) == errors.USAGE
    assert "unknown families nonsense; known are llama" in capsys.readouterr().err


def test_the_document_counts_what_is_served_refused_and_wrong() -> None:
    good = Row("llama", 1.0, "", 0.0, {"standard": 1e-6, "ort": 1e-6}, {"standard": True, "ort": True}, {"1": "why"})
    good.passed |= {"engine": True}
    wrong = Row("mixtral", 1.0, "", 0.0, {"standard": 0.3}, {"standard": False}, {}, {"standard": "parity fails"})
    refused = Row("mamba", 0.9, "layers keep a state", 0.0, reasons={"ort": "mamba cannot: layers keep a state"})
    later = Row("afmoe", 1.0, "", 0.0, dict(good.errors), dict(good.passed))
    assert (good.served, wrong.wrong, refused.served or refused.wrong) == (True, True, False)
    text = family_page.document({row.family: row for row in (good, wrong, refused, later)})
    assert "Of the 3 families on the original list, 1 pass quantization" in text
    assert "of 1 families added later, 1 do" in text
    assert "1 cannot be quantized" in text
    assert "1 give wrong results" in text
    assert "Not run: `qwen2`, `qwen3`," in text
    assert "| `llama` | 100% | same | 1e-06 | 1e-06 * | - | - | - | built |  |" in text
    assert "| `mamba` | 90% | same | refused | refused | refused | refused | - | - | layers keep a state |" in text


def test_a_family_that_takes_too_long_is_ended_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(families, "_load", lambda: None)
    monkeypatch.setattr(families, "sweep", lambda *_: time.sleep(60))
    families.run(["llama"], tmp_path, 0.2)
    assert asdict(families._read(tmp_path / "llama" / "row.json"))["reasons"] == {"run": "ended after 0.2 s"}
    known = Row("llama", 1.0, errors={"fp16": 1e-3}, passed={"fp16": True})
    families._keep(tmp_path / "llama", known)
    families.run(["llama"], tmp_path, 0.2)
    found = families._read(tmp_path / "llama" / "row.json")
    assert (found.packed, found.errors, found.passed) == (1.0, {"fp16": 1e-3}, {"fp16": True}), "what is known stays"


KEPT = {"deepseek_v3": {"0", "1"}, "llama4_text": {"0"}}
"""Layers that keep the standard attention."""


@pytest.mark.parametrize("family", [family for family in MOST_USED if family not in tiny.FAMILIES])
def test_families_that_are_used_most_pass(family: str, tmp_path: Path, one_trace: None) -> None:
    """From quantize to parity on both graphs; the others are in `tests.exporter.test_families`."""
    steps = ("standard", "ort", *(["static"] if family in KEPT else []))
    row = families.sweep(family, tmp_path, steps)
    assert row.reasons == {}
    assert row.passed == dict.fromkeys(steps, True)
    assert set(row.kept) == KEPT.get(family, set())
    assert (row.reload or 0) < 1e-5
    assert (row.packed or 0) > 0.95


def test_steps_that_were_not_run_stay_as_they_are_known() -> None:
    known = Row("llama", 1.0, "", 0.0, {"ort": 1e-6, "fp16": 1e-3}, {"ort": True, "fp16": True}, {"0": "why"})
    row = Row("llama", 1.0, "", 0.0, {"standard": 1e-6}, {"standard": True})
    families._join(row, known, ["standard", "fp16"])
    assert row.errors == {"standard": 1e-6, "ort": 1e-6}
    assert row.kept == {"0": "why"}
    broken = Row("llama")
    families._join(broken, known, ["standard"])
    assert broken.errors == {}


def test_a_run_of_some_families_does_not_drop_the_others_from_the_document() -> None:
    page = (ROOT / "docs" / "families.md").read_text()
    everything = {**FAMILIES, **FURTHER}
    assert family_page.without_result(page, everything) == []
    assert len(family_page.without_result(page, ("llama", "qwen2"))) == len(everything) - 2


def test_a_sweep_goes_on_where_a_step_has_no_result(tmp_path: Path) -> None:
    rows = {"none": None, "half": Row("half", 1.0, passed={"standard": True})}
    rows |= {"refused": Row("refused", 1.0, "it keeps a state"), "failed": Row("failed", None)}
    for name, row in rows.items():
        (tmp_path / name).mkdir()
        if row is not None:
            families._keep(tmp_path / name, row)
    assert [name for name in rows if families._lacks(tmp_path / name, ["standard", "ort"])] == ["none", "half"]


def test_another_result_than_the_document_has_is_noticed() -> None:
    errors_of, passed = {"standard": 1e-6, "ort": 1e-6}, {"standard": True, "ort": True}
    before = {
        name: Row(name, 1.0, "", 0.0, dict(errors_of), dict(passed)) for name in ("llama", "opt", "gpt2", "phi", "mpt")
    }
    page = family_page.document(before)
    now = {name: Row(name, 1.0, "", 0.0, dict(errors_of), dict(passed)) for name in before}
    now["llama"].errors["ort"] = 3e-7  # sums in another order
    now["opt"] = Row("opt", 1.0, "its code asks | for sizes", 0.0)
    now["gpt2"].packed = 0.4
    now["phi"].passed["fp16"], now["phi"].errors["fp16"] = True, 1e-3  # was not measured
    now["mpt"] = Row("mpt", reasons={"quantize": "it has no blocks"})
    assert family_page.changed(page, now) == ["opt", "gpt2", "mpt"]
    assert family_page.changed(family_page.document(now), now) == []
