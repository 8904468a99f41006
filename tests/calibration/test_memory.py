"""A limit of memory: what it means, which pages are let go of, and that it changes no result."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankbook.calibration import memory
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.model.by_block import by_block
from rankbook.calibration.model.capture import BlockStatistics
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.placement import Placement, Stream
from rankbook.tools.runtimes.torch import TorchModel
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


def test_pages_that_were_changed_and_swapped_out_stay() -> None:
    """They are not resident, and no anonymous page of the mapping is counted any more."""
    counts = "Rss: {} kB\nAnonymous: {} kB\nAnonHugePages: 0 kB\nSwap: {} kB\nSwapPss: 0 kB\n"
    found = [(4096, 0, 0), (4096, 4, 0), (4096, 0, 4), (4, 0, 0)]
    header = "{0}000-{0}fff rw-p 00000000 fd:01 17 /data/w.safetensors\n"
    maps = "".join(header.format(place) + counts.format(*sizes) for place, sizes in enumerate(found, 1))
    assert list(memory._idle(maps)) == [(0x1000, 0x1FFF)]


def test_pages_are_let_go_of_by_the_thread_that_holds_the_limit(monkeypatch: pytest.MonkeyPatch, narrow: None) -> None:
    """It waits for the others: what these free and take meanwhile may lie where a mapping was."""
    released: list[int] = []
    monkeypatch.setattr(memory, "release_mapped", lambda: released.append(threading.get_ident()))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(memory.relieve).result()
    assert released == []
    memory.relieve()
    assert released == [threading.get_ident()]


def test_a_full_disk_is_named(tmp_path: Path, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left.*GB of calibration data.*--memory-limit") as caught:
        Placement(folder=tmp_path).empty((1 << 10, 1 << 10), torch.float32)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_large_activations_are_in_a_file(tmp_path: Path, narrow: None) -> None:
    held = Placement(folder=tmp_path).empty((4, 8, 16), torch.bfloat16)
    assert list(tmp_path.iterdir()) == []
    assert f"{tmp_path}/" in Path("/proc/self/maps").read_text()
    stream = Stream(held, Placement(folder=tmp_path))
    stream.write(0, torch.full((4, 8, 16), 3.0), "block")
    assert torch.equal(stream.copied().values, torch.full((4, 8, 16), 3.0, dtype=torch.bfloat16))


def test_matrices_wait_in_files_while_a_block_is_trained(tmp_path: Path) -> None:
    one, other, unseen = LayerStatistics.empty(16), LayerStatistics.empty(16), LayerStatistics.unseen(16)
    one.update(torch.eye(16))
    other.update(2 * torch.eye(16))
    statistics = BlockStatistics({"gate": one, "up": one, "down": other, "unseen": unseen}, {})
    before = one.gram
    statistics.put_aside(Placement(folder=tmp_path))
    assert one.gram is before, "nothing limits the memory"
    with memory.limited("1kB"):
        statistics.put_aside(Placement(folder=tmp_path))
    assert one.gram is not before
    assert statistics["gate"].gram is statistics["up"].gram
    assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/") == 2, "each once, and none that take no memory"
    assert torch.equal(one.gram, torch.eye(16))
    assert torch.equal(other.gram, 4 * torch.eye(16))


def test_a_limit_changes_no_result(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    for name, limit in (("free", None), ("limited", "32kB")):
        chosen = options(tmp_path, method="lcq", method_options={"steps": 2}, memory_limit=limit)
        quantize_model(tmp_path / "model", tmp_path / name, chosen)
    assert files(tmp_path / "limited") == files(tmp_path / "free")


@pytest.mark.parametrize(("family", "packed"), [("llama", False), ("llama", True), ("gemma2", False)])
def test_a_model_computes_block_by_block_as_a_whole(tmp_path: Path, family: str, packed: bool) -> None:
    """Gemma's embedding multiplies its rows by a factor that bfloat16 would round."""
    tiny_model(family, tmp_path / "model", hidden_size=96).to(torch.bfloat16).save_pretrained(tmp_path / "model")
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


def test_tokens_go_where_the_embeddings_are(tmp_path: Path, narrow: None) -> None:
    """Which is not where the blocks compute: under a limit weights stay on the host."""
    tiny_model("llama", tmp_path / "model")
    model = TorchModel(tmp_path / "model", device="cpu")
    tokens = np.arange(4)[None]
    want = model.scores(tokens)
    model.device = torch.device("meta")
    np.testing.assert_array_equal(model.scores(tokens), want)
