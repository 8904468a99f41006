"""Blocks that are alike are traced once, and the file computes what the model does, whatever its blocks are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llama import modeling_llama

from rankbook.calibration.model.loading import load_model
from rankbook.exporter.conform import check_model
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.repeat import Plan
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.checkpoints import make_checkpoint
from tests.exporter.compare import worst_error

TOLERANCE = 1e-4


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks were traced in each export that copied others."""
    found: list[int] = []
    complete = Plan.complete

    def counting(plan: Plan, *given: Any) -> None:
        complete(plan, *given)
        found.append(plan.traced)

    monkeypatch.setattr(Plan, "complete", counting)
    return found


@pytest.mark.parametrize(
    ("family", "layers", "how", "traced"),
    [
        ("llama", 5, {"error_branch": "lqer", "error_rank": 2}, 3),
        # The fourth block is a kind of its own; the others are met twice before it.
        ("opt", 6, {"skip": ("*.3.fc1",)}, 4),
    ],
)
def test_copies_compute_what_the_model_does(
    family: str, layers: int, how: dict[str, Any], traced: int, tmp_path: Path, completed: list[int]
) -> None:
    checkpoint = make_checkpoint(tmp_path, family, model={"num_hidden_layers": layers}, bits=4, **how)
    report = export(checkpoint, tmp_path / "out", ExportOptions(logits="all"))
    assert completed == [traced]
    assert check_model(tmp_path / "out") == []
    assert sum(count for name, count in report.nodes.items() if name.startswith("Codebook")) == report.layers
    assert worst_error(tmp_path / "out", load_model(checkpoint)[0], logits="all") < TOLERANCE


def test_copies_write_caches_of_a_fixed_length(tmp_path: Path, completed: list[int]) -> None:
    checkpoint = make_checkpoint(tmp_path, "llama", model={"num_hidden_layers": 4, "head_dim": 16}, bits=4)
    export(checkpoint, tmp_path / "out", ExportOptions(logits="all", graph="static", max_context=16))
    assert completed == [3]
    tokens = np.random.default_rng(0).integers(0, 256, (1, 12))
    file, want = OrtModel(tmp_path / "out"), TorchModel(checkpoint).logits(tokens)[0]
    steps = [file.start(tokens[:, :10]), *(file.step(int(token)) for token in tokens[0, 10:])]
    assert np.abs(np.stack(steps) - want[9:]).max() < TOLERANCE * np.abs(want).max()


def test_blocks_that_compute_by_their_number_are_all_traced(
    tmp_path: Path, completed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaAttention.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return output * (1 + self.layer_idx), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", scaled)
    checkpoint = make_checkpoint(tmp_path, "llama", model={"num_hidden_layers": 4}, bits=4)
    export(checkpoint, tmp_path / "out", ExportOptions(logits="all"))
    assert completed == []
    assert worst_error(tmp_path / "out", load_model(checkpoint)[0], logits="all") < TOLERANCE
