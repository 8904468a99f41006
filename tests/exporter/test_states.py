"""Models with states: one graph takes prompts in pieces and single tokens, and continues the states of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.exporter.cache import parts_of
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.file import ExportedModel
from rankbook.exporter.repeat import Plan, UnlikeError
from rankbook.exporter.skeleton import build
from rankbook.exporter.trace import _traced
from rankbook.tools.deploy.checks import check_cache
from rankbook.tools.dev import family_models
from rankbook.tools.dev.family_models import FAMILIES, tiny
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.tiny import write_text

# float32 sums in another order; 1e-6 is typical.
TOLERANCE = 1e-5
STEPS = 40
STATES = {
    "lfm2": {"past_conv.0"},
    "mamba": {"past_conv.0", "past_state.0", "past_conv.1", "past_state.1"},
    "falcon_h1": {"past_conv.0", "past_state.0", "past_conv.1", "past_state.1"},
}


def checkpoint(folder: Path, family: str) -> Path:
    """Quantize a tiny model of a family."""
    tiny(family, folder / "model")
    text = str(write_text(folder / "text.txt"))
    how = QuantizeOptions(
        method="rtn", bits=4, group_size=32, calib=text, calib_sequences=2, calib_length=32, allow_partial=True
    )
    quantize_model(folder / "model", folder / "checkpoint", how)
    return folder / "checkpoint"


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest difference relative to the largest number."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def assert_continues(model: OrtModel, original: TorchModel) -> None:
    """Compare a prompt and forty greedy steps."""
    prompt = np.arange(30, dtype=np.int64)[None] * 7 % 250
    want, got = original.start(prompt), model.start(prompt)
    for _ in range(STEPS):
        assert error(got, want) < TOLERANCE
        token = int(want.argmax())
        assert int(got.argmax()) == token
        want, got = original.step(token), model.step(token)


@pytest.mark.parametrize("family", STATES)
def test_states_are_inputs_and_outputs(family: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, family)
    export(folder, tmp_path / "out", ExportOptions(logits="all"))
    model, original = OrtModel(tmp_path / "out", threads=1), TorchModel(folder, threads=1)
    found = {name for name in model.file.inputs if name.startswith(("past_conv.", "past_state."))}
    assert found == STATES[family]
    assert {name.replace("past", "present") for name in found} <= set(model.file.outputs)
    assert_continues(model, original)
    tokens = np.arange(100, dtype=np.int64)[None] * 11 % 250
    want, at = original.scores(tokens), 0
    model._reset(1)
    for count in (7, 1, 70, 22):  # pieces of a prompt, one longer than a chunk of a recurrence
        piece = tokens[:, at : at + count]
        assert error(model._advance(piece), want[0, at + count - 1]) < TOLERANCE
        at += count
    with pytest.raises(UsageError, match="states of convolutions and recurrences"):
        check_cache(ExportedModel.open(tmp_path / "out"))
    with pytest.raises(ValueError, match="--graph standard"):
        export(folder, tmp_path / "static", ExportOptions(graph="static"))
    if family == "falcon_h1":  # states change places where keys and values are written in place
        export(folder, tmp_path / "ort", ExportOptions(graph="ort"))
        assert_continues(OrtModel(tmp_path / "ort", threads=1), original)


def test_padding_at_the_left_changes_nothing(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "lfm2")
    export(folder, tmp_path / "out")
    model, original = OrtModel(tmp_path / "out", threads=1), TorchModel(folder, threads=1)
    tokens = torch.arange(9)[None] * 7 % 250
    padded = np.concatenate([np.full((1, 4), 258), tokens.numpy()], 1)
    mask = (np.arange(13) >= 4).astype(np.int64)[None]
    feeds = model.feeds(padded) | {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    got = model.session.run(["logits"], {name: np.asarray(value) for name, value in feeds.items()})[0]
    assert error(got[:, -1], original.scores(tokens.numpy())[:, -1]) < TOLERANCE


def test_blocks_with_states_are_copied_where_their_constants_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, traced = family_models._fill, []
    complete = Plan.complete

    def alike(model: Any) -> None:
        fill(model)
        for block in model.model.layers[1:]:
            block.conv.conv.load_state_dict(model.model.layers[1].conv.conv.state_dict())

    def counting(plan: Plan, *given: Any) -> None:
        complete(plan, *given)
        traced.append(plan.traced)

    layers = {"num_hidden_layers": 5, "layer_types": ["full_attention", *["conv"] * 4]}
    monkeypatch.setitem(FAMILIES, "lfm2", {**FAMILIES["lfm2"], **layers})
    monkeypatch.setattr(family_models, "_fill", alike)
    monkeypatch.setattr(Plan, "complete", counting)
    folder = checkpoint(tmp_path, "lfm2")
    export(folder, tmp_path / "out")
    assert traced == [3]
    assert_continues(OrtModel(tmp_path / "out", threads=1), TorchModel(folder, threads=1))
    plan = Plan.of(skeleton := build(open_checkpoint(folder), torch.float32))
    assert plan is not None
    with torch.no_grad():
        skeleton.model.model.layers[4].conv.conv.weight[0] += 1
    parts = [part for part in parts_of(skeleton) if part.layer < plan.traced]
    with plan.shortened(skeleton.model):
        model = _traced(skeleton, ExportOptions(), parts)
    with pytest.raises(UnlikeError, match=r"layers.4.conv.conv.weight differ"):
        plan.complete(model, skeleton)
