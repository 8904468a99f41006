"""What earlier versions wrote is read, and gives what it gave then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.exporter.conform import check
from rankbook.exporter.file import ExportedModel
from rankbook.plugins.library import unavailable as library_unavailable
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel

OLD = sorted(path for path in Path(__file__).parent.iterdir() if (path / "expected.json").is_file())
KERNELS = ["bodies", *([] if library_unavailable("ort") else ["native"])]


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest) -> Path:
    """A folder with a checkpoint, the file exported from it, and what they gave."""
    folder: Path = request.param
    return folder


def expected(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return np.array(found["ids"]), np.array(found["logits"], np.float32)


def test_a_checkpoint_is_read_with_its_hashes(old: Path) -> None:
    found = open_checkpoint(old / "checkpoint", verify=True)
    assert f"format-{found.manifest['format_version']}" == old.name
    for name in found.layers:
        found.record(name)
    ids, logits = expected(old)
    np.testing.assert_allclose(TorchModel(old / "checkpoint").logits(ids), logits, rtol=1e-4, atol=1e-5)


def test_an_exported_file_is_read_with_its_hashes(old: Path) -> None:
    model = ExportedModel.open(old / "onnx")
    model.verify()
    check(model)
    ids, logits = expected(old)
    for kernels in KERNELS:
        found = OrtModel(old / "onnx", kernels=kernels).logits(ids)
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5, err_msg=kernels)
