"""GGUF files that the gguf package has written: what is packed, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model.loading import load_model
from tests.calibration.imports.writers import check_same
from tests.gguf_files import write_gguf


def test_a_packed_embedding_stays_tied(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tied=True, ffn_up="Q8_0", token_embd="Q4_1")
    report = import_model(tmp_path / "model.gguf", tmp_path / "q")
    layers = open_checkpoint(tmp_path / "q").layers
    assert set(layers) == {"model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"}
    assert layers["model.embed_tokens"].kind == "embedding"
    assert layers["lm_head"].shared_with == "model.embed_tokens"
    # As in a quantization's report: linear layers are those of the blocks, the embedding counts for itself.
    assert report.totals["linear"]["weights"] == layers["model.layers.0.mlp.up_proj"].weights
    assert report.bits_per_weight == layers["model.layers.0.mlp.up_proj"].bits_per_weight()
    assert report.totals["embeddings"]["bits_per_weight"] == layers["model.embed_tokens"].bits_per_weight()
    assert report.totals["lm_head"]["shared_with"] == "model.embed_tokens"
    dense, _ = load_model(tmp_path / "model.gguf")
    packed, _ = load_model(tmp_path / "q")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gate", "down"), [("Q4_0", "Q8_0"), ("MXFP4", "MXFP4"), ("Q4_K", "Q6_K")])
def test_experts_are_those_of_the_file(gate: str, down: str, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"ffn_gate_exps": gate, "ffn_up_exps": gate, "ffn_down_exps": down, "attn_q": gate}
    write_gguf(tmp_path / "model.gguf", hidden=256, wide=256, experts=3, **kinds)
    report = import_model(tmp_path / "model.gguf", tmp_path / "q")
    assert len(report.layers) == 1 + 2 * 3
    check_same(tmp_path / "q", tmp_path / "model.gguf")


def test_experts_in_part_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", experts=3, ffn_gate_exps="Q4_0")
    with pytest.raises(ValueError, match=r"parts of .*experts.gate_up_proj are in float, and others in Q4_0"):
        import_model(tmp_path / "model.gguf", tmp_path / "q")
    write_gguf(tmp_path / "other.gguf", experts=3, ffn_gate_exps="Q4_0", ffn_up_exps="Q8_0")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: it is quantized in another way"):
        import_model(tmp_path / "other.gguf", tmp_path / "q")


def test_a_file_in_float_is_sent_to_quantize(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"no quantized matrix.*rankbook quantize"):
        import_model(tmp_path / "model.gguf", tmp_path / "q")


def test_a_type_without_a_record_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", hidden=256, wide=256, ffn_up="IQ2_XXS")
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight is a matrix of Linear in IQ2_XXS; what can be imported"):
        import_model(tmp_path / "model.gguf", tmp_path / "q")
