"""Finished blocks come back as they were saved, and a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rankbook.calibration.driver.resume import BlockResult, PartialState
from rankbook.calibration.model.packed_modules import CodebookLinear
from tests.calibration.records import random_record


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
