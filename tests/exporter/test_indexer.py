"""Attention over the keys that an indexer chooses: they are kept like keys, and one graph chooses for any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rankbook.exporter.export import ExportOptions, export
from rankbook.tools.runtimes.ort import OrtModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.exporter.test_states import (
    assert_continues,
    assert_padding_behind_a_text_changes_nothing,
    checkpoint,
    error,
)


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
