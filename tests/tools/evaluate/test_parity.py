"""Parity finds its checkpoint and its tokens, and refuses what it cannot check; its numbers: test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankbook.calibration.notes import Note
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate import parity
from rankbook.tools.evaluate.node_checks import Captured, compare_layers
from rankbook.tools.evaluate.options import ParityOptions
from tests.tiny import VOCABULARY, tiny_tokenizer


def test_a_checkpoint_is_found_where_the_export_noted_it_or_beside(tmp_path: Path) -> None:
    exported, checkpoint = tmp_path / "work" / "onnx", tmp_path / "elsewhere" / "q"
    exported.mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    assert parity.noted_checkpoint(exported / "model.onnx") is None
    (exported / "rankbook-export.yaml").write_text(f"export:\n  checkpoint: {checkpoint}\n")
    assert parity.noted_checkpoint(exported / "model.onnx") == checkpoint
    checkpoint.rename(tmp_path / "work" / "q")  # both were moved together
    assert parity.noted_checkpoint(exported / "model.onnx") == tmp_path / "work" / "q"
    (tmp_path / "work" / "q").rmdir()
    assert parity.noted_checkpoint(exported / "model.onnx") is None


def test_folders_that_moved_together_are_found_from_every_folder(tmp_path: Path, monkeypatch) -> None:
    """The way from one to the other is kept, however deep they lie, and the folder of the file may be renamed."""
    exported, checkpoint = tmp_path / "work" / "out" / "onnx", tmp_path / "work" / "deep" / "q"
    exported.mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    (exported / "rankbook-export.yaml").write_text(f"export:\n  checkpoint: {checkpoint}\n  output: {exported}\n")
    (tmp_path / "work").rename(tmp_path / "moved")
    exported = (tmp_path / "moved" / "out" / "onnx").rename(tmp_path / "moved" / "out" / "renamed")
    monkeypatch.chdir(exported)
    assert parity.noted_checkpoint(Path("model.onnx")) == tmp_path / "moved" / "deep" / "q"
    monkeypatch.chdir("/")
    assert parity.noted_checkpoint(exported / "model.onnx") == tmp_path / "moved" / "deep" / "q"


def test_tokens_are_random_or_those_of_a_text(tmp_path: Path) -> None:
    held: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    options = ParityOptions(tokens=8, seed=3)
    random = parity.compared_tokens(held, VOCABULARY, None, options)
    assert random.shape == (2, 8)
    assert int(random.max()) < VOCABULARY
    assert (random == parity.compared_tokens(held, VOCABULARY, None, options)).all()
    (tmp_path / "text.txt").write_text("abcdefghijklmnop")
    assert (
        held.tokenizer.decode(parity.compared_tokens(held, VOCABULARY, tmp_path / "text.txt", options).flatten())
        == "abcdefghijklmnop"
    )
    (tmp_path / "text.txt").write_text("abcdefgh")
    with pytest.warns(Note, match="is short: compared on 1 x 8 tokens"):
        parity.compared_tokens(held, VOCABULARY, tmp_path / "text.txt", options)


def test_too_few_tokens_for_the_check_of_the_cache(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcd")
    held: Any = SimpleNamespace(tokenizer=tiny_tokenizer())
    with pytest.raises(UsageError, match="has 4 tokens; give a text of at least 5"):
        parity.compared_tokens(held, VOCABULARY, tmp_path / "text.txt", ParityOptions(tokens=8))
    with pytest.raises(UsageError, match="--tokens 4 is too few; give at least 5"):
        parity.parity("nothing", options=ParityOptions(tokens=4))


def test_layers_that_are_not_compared_are_said() -> None:
    file: Any = SimpleNamespace(file=SimpleNamespace(outputs_of={"a.proj": "x", "b.proj": "y"}))
    with pytest.warns(Note, match=r"2 packed layers \(a.proj, ...\) have no module"):
        assert compare_layers(file, Captured(), np.zeros((1, 8), np.int64), 1e-4) == ()
