"""Random models of a given shape, to measure memory and time with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rankbook.calibration.model.loading import load_model
from rankbook.tools.dev import scale

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}


def test_a_model_in_shards_is_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_VOCABULARY", 300)
    monkeypatch.setattr(scale, "_SHARD_BYTES", 200_000)
    weights = scale.write_model(tmp_path / "m", TINY, 2)
    shards = set(json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    assert {path.name for path in (tmp_path / "m").glob("*.safetensors")} == shards
    model, tokenizer = load_model(tmp_path / "m")
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers) == 2
    assert tokenizer.decode(tokenizer("a fox")["input_ids"]) == "a fox"


def test_time_is_said_by_weights() -> None:
    row = scale.Row("7B", 4, 2_000_000_000, "quantize rtn", 10.0, 9.0, 3_000_000_000, 4_000_000_000, "4GiB")
    line = "| 7B, 4 of 32 blocks | 4.00 | quantize rtn | 4GiB | 3.00 | 9 | 4 | 30 (extrapolated) |"
    assert scale.table([row]).splitlines()[-1] == line


def test_what_was_not_measured_is_said() -> None:
    rows = [scale.Row(size, 4, 1, f"quantize {run}", 1.0, 1.0, 1, 1) for size in scale.SIZES for run in scale.RUNS]
    assert scale.unmeasured(rows) == "All sizes were measured with all of these runs."
    killed = scale.Row("7B", 4, 1, "quantize rtn, killed after 1 blocks", 1.0, 1.0, 1, 1)
    said = scale.unmeasured([killed, *(row for row in rows if row.size != "7B" and row.verb != "quantize lcq")])
    assert said == "**Not measured**: lqer: 7B; lcq-fast: 7B; lcq: 0.1B, 0.5B, 1B, 3B, 7B, 16B."


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "_VOCABULARY", 300)
    monkeypatch.setitem(scale.SIZES, "0.1B", {**TINY, "num_hidden_layers": 24})  # not done before it is killed
    assert scale.main(["--sizes", "0.1B", "--runs", "--kill-after", "1", "--threads", "1", "-o", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["verb"] for row in rows] == ["quantize rtn, killed after 1 blocks", "quantize rtn, resumed to 2 blocks"]
    assert all(row["peak_rss_bytes"] > 0 for row in rows)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "text.txt"}
