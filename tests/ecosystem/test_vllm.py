"""vLLM, built for CPUs, serves what `export --format compressed-tensors` writes."""

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

pytestmark = needs("vllm")
IDS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
SCRIPT = """
import json, os, sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams

ids = json.loads(sys.argv[2])
model = LLM(model=sys.argv[1], dtype="float16", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True)
chosen = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
(found,) = model.generate([{"prompt_token_ids": ids}], chosen, use_tqdm=False)
print(json.dumps([place[token].logprob for place, token in zip(found.prompt_logprobs[1:], ids[1:])]))
"""
CASES: dict[str, dict[str, Any]] = {
    "symmetric groups": {"bits": 4, "weight_format": "symmetric"},
    "asymmetric groups": {"bits": 4, "param_bits": 16},
}
MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "initializer_range": 0.1}
"""A head has 64 features, and rows have whole groups of 32, as its kernels want."""


@pytest.mark.parametrize("case", CASES)
def test_it_measures_what_the_checkpoint_measures(case: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", model=MODEL, group_size=32, **CASES[case])
    export_compressed_tensors(checkpoint, tmp_path / "out", torch.float16)
    with torch.no_grad():
        logits = load_model(checkpoint)[0](torch.tensor([IDS])).logits[0]
    want = logits[:-1].log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    got = torch.tensor(json.loads(run_in("vllm", SCRIPT, tmp_path / "out", json.dumps(IDS)).splitlines()[-1]))
    assert want.std() > 0.5
    assert (got - want).abs().max() < 0.02  # it computes in float16
