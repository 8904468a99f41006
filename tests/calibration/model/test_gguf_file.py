"""A GGUF file is parsed once, whoever reads it, and gives the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from rankbook.calibration.model.gguf_file import read_once
from rankbook.calibration.model.loading import load_model, load_tokenizer
from tests.gguf_files import write_gguf


def test_a_model_and_its_tokenizer_parse_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf")
    library: Any = gguf
    parsed: list[Any] = []
    maps: list[Any] = []

    def counted(found: list[Any], call: Any) -> Any:
        def run(*args: Any) -> Any:
            found.append(args)
            return call(*args)

        return run

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted(parsed, library.GGUFReader._build_fields))
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted(maps, library.get_tensor_name_map))
    model, tokenizer = load_model(tmp_path / "model.gguf")
    assert len(parsed) == 1
    assert len(maps) == len(set(maps))
    assert tokenizer.get_vocab() == load_tokenizer(tmp_path / "model.gguf").get_vocab()
    stored = {tensor.name: tensor.data for tensor in library.GGUFReader(tmp_path / "model.gguf").tensors}
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert torch.equal(down, torch.from_numpy(stored["blk.0.ffn_down.weight"].copy()))


def test_the_library_is_as_before_afterwards_also_after_an_error() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with read_once():
        outer = gguf.GGUFReader
        with read_once():  # shares what the outer one has parsed
            inner = gguf.GGUFReader
    assert inner is outer is not before[0]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    with pytest.raises(KeyError), read_once():
        raise KeyError
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
