"""Exported folders whose files are links: as the cache of the Hugging Face hub lays them out, and hard links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankbook.exporter.export import export
from rankbook.exporter.options import ExportOptions
from rankbook.tools import errors
from rankbook.tools.runtimes import open_model
from tests.exporter.checkpoints import make_checkpoint
from tests.tools.files import run_cli


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its file ``onnx`` in MatMulNBits, and the same file behind symbolic and hard links."""
    folder = tmp_path_factory.mktemp("links")
    checkpoint = make_checkpoint(folder, "llama", model={"hidden_size": 64, "intermediate_size": 96}, bits=4)
    export(checkpoint, folder / "onnx", ExportOptions(dialect="ort"))
    for name in ("snapshots/1", "blobs", "hard"):
        (folder / name).mkdir(parents=True)
    for index, file in enumerate(sorted((folder / "onnx").iterdir())):
        (folder / "blobs" / str(index)).write_bytes(file.read_bytes())
        (folder / "snapshots/1" / file.name).symlink_to(f"../../blobs/{index}")
        os.link(file, folder / "hard" / file.name)
    return folder


@pytest.mark.parametrize("name", ["snapshots/1", "hard"])
def test_parity_and_a_peer_of_linked_folders(name: str, work: Path) -> None:
    assert run_cli("parity", work / name, "--checkpoint", work / "checkpoint", "--tokens", 20, "--quiet") == 0
    assert open_model(work / name, "matmulnbits").file_bytes > 0


def test_a_link_that_leads_out_is_refused(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The graph lies in the folder itself, so its data must too."""
    (tmp_path / "model.onnx").write_bytes((work / "onnx" / "model.onnx").read_bytes())
    (tmp_path / "model.onnx.data").symlink_to(work / "onnx" / "model.onnx.data")
    assert run_cli("parity", tmp_path, "--checkpoint", work / "checkpoint", "--quiet") == errors.USAGE
    assert "outside of" in capsys.readouterr().err
