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
from rankbook.exporter.cache_names import is_present, past_of
from rankbook.exporter.export import ExportOptions, export
from rankbook.exporter.repeat import Plan, UnlikeError
from rankbook.exporter.skeleton import build
from rankbook.exporter.trace import _traced
from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.dev import family_models
from rankbook.tools.dev.family_models import FAMILIES, tiny
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import open_model
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from rankbook.tools.serve.slots import slots_of
from tests import tensorrt_stand_in as stand_in
from tests.tiny import write_text

# float32 sums in another order; 1e-6 is typical.
TOLERANCE = 1e-5
STEPS = 40
STATES = {
    "lfm2": {"past_conv.0"},
    "mamba": {"past_conv.0", "past_state.0", "past_conv.1", "past_state.1"},
    "falcon_h1": {"past_conv.0", "past_state.0", "past_conv.1", "past_state.1"},
    "minimax": {"past_state.0"},
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


def assert_padding_behind_a_text_changes_nothing(folder: Path, original: TorchModel, output: Path) -> None:
    """Two texts side by side at their own pace, then one after the other: none begins with the state of another."""
    export(folder, output, ExportOptions(graph="static", sample="greedy", max_context=128))
    model = OrtModel(output, threads=1)
    tokens = np.random.default_rng(0).integers(0, 250, (2, 100))
    want, filled = original.scores(tokens), np.zeros(2, np.int64)
    past = {name: value.numpy() for name, value in fresh_cache(model, 2).items()}
    for counts in ((12, 5), (3, 0), (1, 1), (2, 70)):
        lengths = np.array(counts)
        given = np.full((2, lengths.max()), 7)
        for row, count in enumerate(counts):
            given[row, :count] = tokens[row, filled[row] : filled[row] + count]
        feeds = {"input_ids": given, "write_indices": filled, "lengths": lengths, **past}
        feeds = {name: value for name, value in feeds.items() if name in model.file.inputs}
        found = dict(zip(model.file.outputs, model.session.run(None, feeds), strict=True))
        past = {past_of(name): found[name] for name in model.file.outputs if is_present(name)}
        filled = filled + lengths
        for ended in np.flatnonzero(lengths):
            assert error(found["logits"][ended, 0], want[ended, filled[ended] - 1]) < TOLERANCE
    for text in (0, 1, 0):
        for count in (9, 10):  # a state is in one piece of memory or in the other
            assert error(model.start(tokens[text : text + 1, :count]), want[text, count - 1]) < TOLERANCE
            assert model.start_best([tokens[text, :count]]).tolist() == [want[text, count - 1].argmax()]


def fresh_cache(model: OrtModel, batch: int) -> dict[str, Any]:
    model._reset(batch)
    return model._cache


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
    if family == "mamba":
        with pytest.raises(ValueError, match=r"no keys and values that --kv int8.*--kv float"):
            export(folder, tmp_path / "int8", ExportOptions(kv="int8"))
    assert_padding_behind_a_text_changes_nothing(folder, original, tmp_path / "static")
    if family == "falcon_h1":  # states change places where keys and values are written in place
        export(folder, tmp_path / "ort", ExportOptions(graph="ort"))
        assert_continues(OrtModel(tmp_path / "ort", threads=1), original)


@pytest.mark.parametrize(("family", "graph"), [("lfm2", "static"), ("lfm2", "standard"), ("mamba", "standard")])
def test_engines_keep_states_from_call_to_call(
    family: str, graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of two lengths side by side, in pieces of 8 tokens; the next ones begin where others have left states."""
    folder, tokens = checkpoint(tmp_path, family), np.random.default_rng(1).integers(0, 250, (2, 24))
    fixed = graph == "static"
    export(folder, tmp_path / "out", ExportOptions(graph=graph, max_context=32 if fixed else None))
    options = BuildOptions(max_batch=2, max_sequence=8, max_context=None if fixed else 32)
    engine = stand_in.build(stand_in.install(monkeypatch), tmp_path / "out", tmp_path / "engine", options)
    model, want = open_model(engine), TorchModel(folder, threads=1).scores(tokens)
    for texts in ((0, 1), (1, 0)):
        held = [19, 5]
        found = model.start_batch([tokens[text, :count] for text, count in zip(texts, held, strict=True)])
        for _ in range(4):
            for row, (text, count) in enumerate(zip(texts, held, strict=True)):
                assert error(found[row], want[text, count - 1]) < TOLERANCE
            found = model.step_batch([tokens[text, count] for text, count in zip(texts, held, strict=True)])
            held = [count + 1 for count in held]
    with pytest.raises(UsageError, match="states of convolutions and recurrences"):
        slots_of(model, 2)


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


def test_every_query_sees_the_keys_that_its_indexer_chooses(tmp_path: Path) -> None:
    """Texts shorter and longer than the 8 keys that are chosen, in one piece and token by token."""
    folder = checkpoint(tmp_path, "deepseek_v32")
    export(folder, tmp_path / "out", ExportOptions(logits="all"))
    model, original = OrtModel(tmp_path / "out", threads=1), TorchModel(folder, threads=1)
    assert {"past_key_values.0.index", "past_key_values.1.index"} < set(model.file.inputs)
    assert_continues(model, original)
    for length in (5, 60):
        tokens = np.arange(length, dtype=np.int64)[None] * 11 % 250
        assert error(model.scores(tokens), original.scores(tokens)) < 1e-5
    assert_padding_behind_a_text_changes_nothing(folder, original, tmp_path / "static")
    # Rounded keys would choose others.
    export(folder, tmp_path / "int8", ExportOptions(kv="int8"))
    model = OrtModel(tmp_path / "int8", threads=1)
    scales = {name for name in model.file.inputs if name.endswith("_scale")}
    assert scales == {f"past_key_values.{layer}.{part}_scale" for layer in (0, 1) for part in ("key", "value")}
    tokens = np.arange(20, dtype=np.int64)[None] * 11 % 250
    assert error(model.start(tokens), original.start(tokens)) < 0.05
