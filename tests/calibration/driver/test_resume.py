"""Finished blocks come back as they were saved, and a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankbook.calibration.driver.allocation import Choice
from rankbook.calibration.driver.resume import BlockResult, PartialState
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.packed_modules import CodebookLinear
from tests.calibration import runs
from tests.calibration.records import random_record
from tests.tiny import tiny_model


def saved(folder: Path) -> tuple[PartialState, CodebookLinear]:
    """Save one block of one layer."""
    state = PartialState(folder / "out", {}, resume=False)
    layer = CodebookLinear.from_record(random_record(bias=True, rank=2))
    state.save(0, BlockResult({"a.b": layer}, {"a.b": 0.5}, {"a.norm": torch.ones(3)}, ["a.b"], [], {"a.b": 0.75}))
    return state, layer


def test_a_block_comes_back(tmp_path: Path) -> None:
    state, layer = saved(tmp_path)
    found = state.load(0)
    assert found.layers["a.b"].spec == layer.spec
    assert all(torch.equal(t, layer.packed()[name]) for name, t in found.layers["a.b"].packed().items())
    assert (found.errors, found.without_branch) == ({"a.b": 0.5}, {"a.b": 0.75})
    assert (list(found.tensors), found.scaled) == (["a.norm"], ["a.b"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, notes: notes.pop("layers"),
        lambda tensors, notes: notes.update(layers="["),
        lambda tensors, notes: notes.update(layers="[]"),
        lambda tensors, notes: notes.update(layers=json.dumps({"a.b": {"bits": 3}})),
        lambda tensors, notes: notes.update(layers="[" * 3000),
        lambda tensors, notes: notes.update(errors="[" * 3000),
        lambda tensors, notes: notes.update(errors='{"a.b": "0.5"}'),
        lambda tensors, notes: notes.update(others="3"),
        lambda tensors, notes: notes.update(others='{"tensors": [], "scaled": [3], "few_tokens": []}'),
        lambda tensors, notes: tensors.pop("a.b.step"),
        lambda tensors, notes: tensors["a.b.step"].fill_(torch.nan),
        lambda tensors, notes: tensors.update({"a.b.codes": torch.zeros(3)}),
    ],
)
def test_a_damaged_block_is_named(tmp_path: Path, damage: Any) -> None:
    state, _ = saved(tmp_path)
    path = next(state.folder.glob("block-*"))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as stream:
        notes = stream.metadata()
    damage(tensors, notes)
    save_file(tensors, path, metadata=notes)
    with pytest.raises(ValueError, match=r"block-00000.safetensors is damaged .*start again without --resume"):
        state.load(0)


@pytest.mark.parametrize("content", [b"", b'\x08\0\0\0\0\0\0\0{"a": 1}', "no description", "other tensors"])
def test_damaged_tokens_are_named(content: bytes | str, tmp_path: Path) -> None:
    state, _ = saved(tmp_path)
    path = state.folder / "tokens.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        name, metadata = ("tokens", {}) if content == "no description" else ("codes", {"description": "a"})
        save_file({name: torch.ones(1, 2)}, path, metadata)
    with pytest.raises(ValueError, match=r"tokens.safetensors is damaged .*start again without --resume"):
        state.tokens()


def test_choices_come_back_and_damaged_ones_are_named(tmp_path: Path) -> None:
    state = PartialState(tmp_path / "out", {}, resume=False)
    assert state.choices() is None
    chosen = {"a.b": Choice(3), "a.c": Choice(4, 2, 0)}
    state.save_choices(chosen)
    assert state.choices() == chosen
    for content in ('{"a.b": {"bits": "3"}}', '{"a.b": {"planes": 2}}', '{"a.b": {"bits": 3, "width": 1}}', "["):
        (state.folder / "choices.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"choices.json .*start again without --resume"):
            state.choices()


def test_a_resumed_run_keeps_what_its_budget_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums on another number of threads may choose otherwise: blocks of two choices may exceed the budget."""
    pytest.importorskip("scipy")
    tiny_model("llama", tmp_path / "model")
    options = runs.options(tmp_path, method="rtn", clip_search=True, target_bits=6.5, group_size=16)
    quantize_model(tmp_path / "model", tmp_path / "whole", options)
    runs.interrupted(tmp_path, options)
    monkeypatch.delattr("rankbook.calibration.driver.run.allocate")
    report = quantize_model(tmp_path / "model", tmp_path / "out", options, resume=True)
    assert report.resumed_at == 1
    assert runs.files(tmp_path / "out") == runs.files(tmp_path / "whole")
