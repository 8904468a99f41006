"""compressed-tensors, the package, reads what `export --format compressed-tensors` writes, through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.model.loading import load_model
from rankbook.exporter.compressed_tensors import export_compressed_tensors
from tests.ecosystem.environments import needs, run_in
from tests.exporter.checkpoints import make_checkpoint

pytestmark = needs("compressed-tensors")
IDS = [[3, 14, 15, 92, 65, 35, 89, 79], [2, 71, 82, 81, 82, 84, 59, 45]]
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert model.config.quantization_config.quantization_config.format == "pack-quantized", model.config
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""
CASES: dict[str, dict[str, Any]] = {
    "symmetric groups": {"bits": 4, "weight_format": "symmetric", "quantize_embeddings": 8},
    "symmetric rows of 8 bits": {"bits": 8, "group_size": "channel", "weight_format": "symmetric"},
    "asymmetric, some of 8 bits": {"bits": 4, "param_bits": 16, "rules": ("*.down_proj: bits=8 group=channel",)},
    "3 bits in 4, some in float": {"bits": 3, "weight_format": "symmetric", "skip": ("*.o_proj",)},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_checkpoint(case: str, tmp_path: Path) -> None:
    family = "opt" if "rows" in case else "llama"  # OPT: tied embeddings, biases, other names
    checkpoint = make_checkpoint(tmp_path, family, **CASES[case])
    export_compressed_tensors(checkpoint, tmp_path / "out", torch.float32)
    with torch.no_grad():
        want = load_model(checkpoint)[0](torch.tensor(IDS)).logits
    printed = run_in("compressed-tensors", SCRIPT, tmp_path / "out", json.dumps(IDS))
    got = torch.tensor(json.loads(printed.splitlines()[-1]))
    # float32 products of the same numbers; zero points whose offsets float16 holds are rounded back: 2e-3 of a step.
    assert (got - want).abs().max() < (1e-3 if "asymmetric" in case else 1e-5) * want.abs().max()
