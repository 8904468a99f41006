"""`export --format compressed-tensors`: the tensors that the package writes, and what it cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankbook.calibration.imports.run import import_model
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.notes import Note
from rankbook.exporter.compressed_tensors import NotCompressibleError, export_compressed_tensors
from rankbook.tools.cli import main
from tests.exporter.checkpoints import make_checkpoint

FIXTURES = Path(__file__).resolve().parents[1] / "calibration" / "imports" / "fixtures"
SYMMETRIC: dict[str, Any] = {"bits": 4, "weight_format": "symmetric"}


@pytest.mark.parametrize("name", ["compressed-w4", "compressed-w4-symmetric", "compressed-w8"])
def test_what_the_package_wrote_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Folders of the real package, imported and exported: the same integers, zero points, scales and shapes."""
    import_model(FIXTURES / name, tmp_path / "q")
    export_compressed_tensors(tmp_path / "q", tmp_path / "out", torch.float16)
    was, found = (load_file(folder / "model.safetensors") for folder in (FIXTURES / name, tmp_path / "out"))
    assert found.keys() == was.keys()
    for key, tensor in was.items():
        same = tensor.dtype if tensor.dtype != torch.bfloat16 else torch.float16
        assert torch.equal(found[key], tensor.to(same)), key
    files = (FIXTURES / name / "config.json", tmp_path / "out" / "config.json")
    original, written = (json.loads(file.read_text())["quantization_config"] for file in files)
    assert original["format"] == written["format"] == "pack-quantized"
    (weights,) = (group["weights"] for group in original["config_groups"].values())
    for group in written["config_groups"].values():  # a row that is one group is a row here
        assert {group["weights"][key] == weights[key] for key in ("num_bits", "type", "symmetric")} == {True}


def test_layers_of_several_kinds_and_embeddings(tmp_path: Path) -> None:
    """Read again by the importer, the logits are those of the checkpoint; what is decoded is said."""
    rules = ("*.down_proj: bits=8 group=channel", "*.o_proj: skip", "*.q_proj: bits=3")
    checkpoint = make_checkpoint(tmp_path, "qwen3", **SYMMETRIC, rules=rules, quantize_embeddings=8)
    with pytest.warns(Note, match="written decoded.*model.embed_tokens, lm_head"):
        report = export_compressed_tensors(checkpoint, tmp_path / "out", torch.float32)
    assert report.schemes == {"W4A16 symmetric, groups of 16": 10, "W8A16 symmetric, one scale a row": 2}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    skipped = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert config["quantization_config"]["ignore"] == [*skipped, "lm_head"]
    import_model(tmp_path / "out", tmp_path / "again")
    ids = torch.tensor([[3, 14, 15, 92]])
    want, got = (load_model(folder)[0](ids).logits for folder in (checkpoint, tmp_path / "again"))
    assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lcq", "bits": 2, "rank": 2, "effort": "fast"}, r"q_proj and 13 more: its codebooks have rank 2"),
        ({**SYMMETRIC, "error_branch": "lqer", "error_rank": 2}, "error branch of rank 2.*without --error-branch"),
        ({"bits": 4, "weight_format": "nf4"}, "not evenly spaced"),
        ({"bits": 4}, "zero points are no whole numbers.*--param-bits 16"),
        ({**SYMMETRIC, "activations": "static8"}, "rounds activations too.*--weights-only"),
    ],
)  # fmt: skip
def test_what_it_cannot_hold_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", **options)
    with pytest.raises(NotCompressibleError, match=message):
        export_compressed_tensors(checkpoint, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", **SYMMETRIC)
    where = ["export", str(checkpoint), "--format", "compressed-tensors", "-o"]
    assert main([*where, str(tmp_path / "out"), "--dtype", "bf16", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.int32, torch.int64}
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text()
    assert main([*where, str(tmp_path / "out"), "--quiet"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*where, str(tmp_path / "out"), "--overwrite", "--quiet"]) == 0
    assert main([*where, str(checkpoint), "--overwrite", "--quiet"]) == 2
    assert "rankbook.json, which compressed-tensors would replace" in capsys.readouterr().err
    assert main([*where, str(tmp_path / "new"), "--graph", "ort"]) == 2
    assert "--graph is about an ONNX file" in capsys.readouterr().err
