"""Every type of block: its weights are those that the gguf package decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.imports.gguf_blocks import TYPES
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model.loading import load_model
from tests.gguf_files import write_gguf

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BITS = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5, "IQ4_NL": 4.5, "Q2_K": 6, "Q3_K": 5, "Q4_K": 6, "Q6_K": 10}
"""Stored bits per weight but for levels; those of the first four are the file's own."""


@pytest.mark.parametrize("kind", TYPES)
def test_weights_and_logits_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    """The reference is the dense model that transformers reads with the gguf package's own decoder."""
    kinds: dict[str, Any] = dict.fromkeys(LINEAR, kind)
    write_gguf(tmp_path / "model.gguf", hidden=256, wide=256, **kinds)
    report = import_model(tmp_path / "model.gguf", tmp_path / "q")
    dense, _ = load_model(tmp_path / "model.gguf")
    packed, _ = load_model(tmp_path / "q")
    layers = open_checkpoint(tmp_path / "q").layers
    assert len(layers) == report.settings["matrices_by_type"][kind] == len(LINEAR)
    for name, spec in layers.items():
        assert spec.method == f"gguf-{kind.lower()}"
        assert torch.equal(packed.get_submodule(name).weight, dense.get_submodule(name).weight), name
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)
    if kind in BITS:
        parts, weights = report.totals["linear"]["parts"], report.totals["linear"]["weights"]
        assert (parts["codes"] + parts["step"]) / weights == pytest.approx(BITS[kind])
