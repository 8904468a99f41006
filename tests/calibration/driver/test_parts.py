"""A checkpoint holds every tensor of every packed layer, also where layers share one in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rankbook.calibration.checkpoint.format import CheckpointError, load_records, write_checkpoint
from rankbook.calibration.driver.parts import checkpoint_parts
from rankbook.calibration.model.packed_modules import CodebookLinear, replace_module
from tests.calibration.records import random_record
from tests.tiny import tiny_model

Q, K = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")


def test_layers_that_share_a_tensor_are_both_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    specs, levels = {}, random_record(seed=9).levels
    for seed, name in enumerate((Q, K)):
        rows, columns = model.get_submodule(name).weight.shape
        record = random_record(rows, columns, seed=seed)
        layer = CodebookLinear.from_record(replace(record, levels=levels))
        specs[name] = layer.spec
        replace_module(model, name, layer)
    assert model.get_submodule(Q).levels is model.get_submodule(K).levels
    parts = checkpoint_parts(model, None, specs, {}, None)
    write_checkpoint(tmp_path / "q", parts)
    found = load_records(tmp_path / "q")
    assert all(torch.equal(found[name].weight(), model.get_submodule(name).weight) for name in specs)
    # Views of one memory are other objects; the library that writes files keeps one of them.
    shared = {f"{K}.levels": parts.tensors[f"{Q}.levels"].view_as(levels)}
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        write_checkpoint(tmp_path / "q", replace(parts, tensors={**parts.tensors, **shared}))
    assert load_records(tmp_path / "q").keys() == specs.keys()
