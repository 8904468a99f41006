"""The random mixture is a model that others read, and rankbook with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankbook.calibration.checkpoint.format import load_records
from rankbook.tools import errors
from rankbook.tools.cli import main
from rankbook.tools.dev import mixture_gguf
from rankbook.tools.dev.mixture_gguf import Shape
from rankbook.tools.runtimes.torch import TorchModel

SMALL = Shape(words=64, blocks=1, hidden=64, heads=2, key_heads=1, head=32, inner=32, experts=4, chosen=2)


def test_it_is_imported_with_its_own_codes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "mixture.gguf"
    mixture_gguf.write(path, SMALL)
    assert main(["import", str(path), "-o", str(tmp_path / "mixture")]) == errors.OK
    record = load_records(tmp_path / "mixture")["model.layers.0.mlp.experts.down_proj.3"]
    assert (record.bits, record.group) == (4, 32)
    stored = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.0.ffn_down_exps.weight")
    want = gguf.quants.dequantize(stored.data, stored.tensor_type)[3]
    assert np.allclose(record.weight().numpy(), want, atol=1e-6)
    scores = TorchModel(tmp_path / "mixture", threads=1).scores(np.arange(8)[None])
    assert np.isfinite(scores).all()
    assert 0.1 < float(np.std(scores)) < 10


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"")
    assert mixture_gguf.main([str(tmp_path / "there")]) == errors.USAGE
