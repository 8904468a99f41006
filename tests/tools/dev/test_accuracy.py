"""The accuracy table: what a row says about the gap it closes."""

from __future__ import annotations

import json
import math

import pytest

from rankbook.tools import errors
from rankbook.tools.dev import accuracy, peers
from tests.tiny import tiny_model, write_text


def test_the_gap_is_measured_in_log_perplexity_against_rtn_at_the_same_bits():
    row = {"bits_per_weight": 3.25, "kl": 0.1, "top1_agreement": 0.5, "quantize_seconds": 1.0, "peak_rss_bytes": 2**30}
    results = {
        "unquantized": {"perplexity": math.exp(1)},
        "a": row | {"bits": 3, "name": accuracy.BASELINE, "perplexity": math.exp(3)},
        "b": row | {"bits": 3, "name": "LCQ rank 2", "perplexity": math.exp(1.5)},
        "c": row | {"bits": 2, "name": "LCQ rank 2", "perplexity": math.exp(1.5)},
    }
    assert [line[3] for line in accuracy.table(results).rows] == [None, "0.0 %", "75.0 %", ""]


def test_a_peer_that_is_not_installed_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    command = ["hqq", str(tmp_path), "--calib", "calib.txt", "-o", str(tmp_path / "out")]
    assert peers.main(command) == errors.MISSING
    assert "pip install hqq" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_model_is_measured_and_finished_rows_are_kept(tmp_path):
    tiny_model("llama", tmp_path / "model", hidden_size=64, intermediate_size=128, max_position_embeddings=512)
    texts = write_text(tmp_path / "c.txt", 20_000), write_text(tmp_path / "e.txt", 8_000)
    command = [
        str(tmp_path / "model"),
        "--calib",
        str(texts[0]),
        "--text",
        str(texts[1]),
        "--rows",
        "RTN",
        "LCQ rank 1, closed form",
    ]
    command += ["--output", str(tmp_path / "out"), "--context", "64", "--max-tokens", "512", "--calib-sequences", "2"]
    assert accuracy.main(command) == 0
    found = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [row.get("name") for row in found.values()] == [None, "RTN", "LCQ rank 1, closed form"]
    assert all(row["perplexity"] > 1 for row in found.values())
    assert accuracy.main(command) == 0
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == found
