"""A limit of memory: what it means, which pages are let go of, and that it changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankbook.calibration import memory
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.by_block import by_block
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.placement import Placement, Stream
from tests.calibration.runs import files, options
from tests.tiny import tiny_model

BYTES = 64 << 20


@pytest.fixture
def narrow() -> Iterator[None]:
    """A limit that everything is beyond."""
    with memory.limited("1kB"):
        yield


def test_sizes_are_read() -> None:
    sizes = {"4GiB": 4 << 30, "1.5 GB": 1_500_000_000, "300m": 300_000_000, "17": 17, "2KiB": 2048}
    assert {text: memory.read_size(text) for text in sizes} == sizes
    for wrong in ("", "GiB", "-1GB", "0", "4 gigabytes", "nan"):
        with pytest.raises(ValueError, match="not a size of memory"):
            memory.read_size(wrong)


def test_the_innermost_limit_holds() -> None:
    assert memory.limit() is None
    with memory.limited("4GiB"), memory.limited(None), memory.limited("1GiB"):
        assert memory.limit() == 1 << 30
        assert memory.beyond_share(1 << 28)
        assert not memory.beyond_share(1 << 26)
    assert not memory.beyond_share(1 << 40)


def test_pages_of_mapped_weights_are_let_go_of_and_come_back(tmp_path: Path, narrow: None) -> None:
    save_file({"w": torch.arange(BYTES // 4, dtype=torch.float32)}, tmp_path / "w.safetensors")
    weight = load_file(tmp_path / "w.safetensors")["w"]
    total = weight.double().sum()
    before = memory._status("RssFile")
    memory.relieve()
    assert before - memory._status("RssFile") > BYTES // 2
    assert weight.double().sum() == total


def test_pages_that_were_changed_in_memory_stay(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(BYTES))
    changed = np.memmap(path, np.uint8, "c")
    assert changed.sum() == 0
    changed[BYTES // 2] = 7
    memory.release_mapped()
    assert changed[BYTES // 2] == 7


def test_large_activations_are_in_a_file(tmp_path: Path, narrow: None) -> None:
    held = Placement(folder=tmp_path).empty((4, 8, 16), torch.bfloat16)
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}/" in Path("/proc/self/maps").read_text()
    stream = Stream(held, Placement(folder=tmp_path))
    stream.write(0, torch.full((4, 8, 16), 3.0), "block")
    assert torch.equal(stream.copied().values, torch.full((4, 8, 16), 3.0, dtype=torch.bfloat16))


def test_a_limit_changes_no_result(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    for name, limit in (("free", None), ("limited", "32kB")):
        chosen = options(tmp_path, method="lcq", method_options={"steps": 2}, memory_limit=limit)
        quantize_model(tmp_path / "model", tmp_path / name, chosen)
    assert files(tmp_path / "limited") == files(tmp_path / "free")


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_computes_block_by_block_as_a_whole(tmp_path: Path, packed: bool) -> None:
    tiny_model("llama", tmp_path / "model").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    source = tmp_path / "model"
    if packed:
        source = tmp_path / "out"
        quantize_model(tmp_path / "model", source, options(tmp_path, method="rtn", bits=4))
    tokens = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    whole, narrow = load_model(source, torch.float32)[0], load_model(source)[0]
    kinds = {name: tensor.dtype for name, tensor in narrow.state_dict().items()}
    with torch.inference_mode():
        want = whole(tokens).logits
        with by_block(narrow, torch.device("cpu")):
            found = narrow(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert {name: tensor.dtype for name, tensor in narrow.state_dict().items()} == kinds
