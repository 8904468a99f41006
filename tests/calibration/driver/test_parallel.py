"""Blocks that are solved with what the original model gives: each as if those before it had not been quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.checkpoint.format import load_records
from rankbook.calibration.driver.report import Progress
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model import capture
from tests.calibration import toy_method
from tests.calibration.runs import files, options
from tests.tiny import tiny_model

RUNS: dict[str, dict[str, Any]] = {
    "closed form": {"method": "gptq", "scale_inputs": "awq"},
    "training, rounded inputs": {
        **{"method": "lcq", "rank": 1, "activations": "static8"},
        "method_options": {"steps": 2, "compute": "float32"},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_block_does_not_see_what_became_of_those_before_it(name: str, tmp_path: Path) -> None:
    """Where the first block is not quantized, what enters the second is the same in any order."""
    tiny_model("llama", tmp_path / "model")
    chosen = {"bits": 2, **RUNS[name]}
    skipped = options(tmp_path, rules=("*.layers.0.*: skip",), allow_partial=True, **chosen)
    quantize_model(tmp_path / "model", tmp_path / "alone", skipped)
    quantize_model(tmp_path / "model", tmp_path / "sequential", options(tmp_path, **chosen))
    quantize_model(tmp_path / "model", tmp_path / "parallel", options(tmp_path, order="parallel", **chosen))
    alone, after, beside = (load_records(tmp_path / way) for way in ("alone", "sequential", "parallel"))
    assert alone
    assert alone.keys() < beside.keys() == after.keys()
    for layer, record in beside.items():
        wanted = alone[layer] if layer in alone else after[layer]  # the first block is the same in both orders
        assert torch.equal(record.codes, wanted.codes), layer
        assert torch.equal(record.weight(with_low_rank=True), wanted.weight(with_low_rank=True)), layer
    assert any(not torch.equal(after[layer].codes, alone[layer].codes) for layer in alone), "no order would matter"


def test_an_interrupted_run_goes_on_with_the_blocks_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "trained-toy", toy_method.TRAINED_TOY)
    tiny_model("gemma2", tmp_path / "model", num_hidden_layers=4)
    chosen = options(tmp_path, order="parallel")
    quantize_model(tmp_path / "model", tmp_path / "whole", chosen)

    def stop(step: Progress) -> None:
        if step.stage == "training" and step.block == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, progress=stop)
    (tmp_path / ".out.partial" / "block-00001.safetensors").unlink()  # blocks of a cluster are finished in any order
    solved: list[str] = []
    quantize_model(
        tmp_path / "model", tmp_path / "out", chosen, resume=True, progress=lambda step: solved.append(step.stage)
    )
    assert [stage for stage in solved if stage.startswith("solved")] == ["solved block 1", "solved block 3"]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_original_model_runs_no_further_than_the_last_block_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", tmp_path / "model", num_hidden_layers=3)
    chosen = options(tmp_path, method="gptq", order="parallel")
    passed: list[str] = []
    advance = capture.advance

    def watched(*args: Any) -> None:
        passed.append(args[3])
        advance(*args)

    monkeypatch.setattr(capture, "advance", watched)

    def stop(step: Progress) -> None:
        if step.stage == "solved block 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(tmp_path / "model", tmp_path / "out", chosen, progress=stop)
    assert len(passed) == 3
    (tmp_path / ".out.partial" / "block-00001.safetensors").unlink()
    quantize_model(tmp_path / "model", tmp_path / "out", chosen, resume=True)
    assert [name.split()[1] for name in passed[3:]] == ["model.layers.0", "model.layers.1"]
