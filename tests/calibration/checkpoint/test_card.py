"""The model card says what was done, and keeps what the card of the source says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rankbook.calibration.checkpoint.card import BESIDE, CARD, write_checkpoint_card, write_export_card
from rankbook.calibration.notes import Note
from rankbook.plugins.layer_spec import LayerSpec

LAYERS = {
    "a": LayerSpec("linear", "lcq", 3, 64, 64, 64, planes=2, has_offset=True, branch_rank=8),
    "b": LayerSpec("linear", "lcq", 4, 64, 64, 64, planes=2, has_offset=True),
}
MANIFEST: dict[str, Any] = {
    "source": {"name": "/home/me/models/Small-1B", "sha256": "0"},
    "calibration": "64 windows x 512 tokens of calib.txt",
    "totals": {"blocks": {"float_share": 0.0}, "model": {"float_share": 0.25}},
    "layers": {"a": {"error": 0.01}, "b": {"error": 0.03}},
}
SOURCE = "---\nlicense: mit\nlanguage:\n- en\n---\n# Small\n\nTrained on text.\n"


def card(folder: Path, manifest: dict[str, Any] = MANIFEST) -> str:
    write_checkpoint_card(folder, LAYERS, manifest)
    return (folder / CARD).read_text("utf-8")


def front(text: str) -> Any:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_method_bits_float_share_calibration_and_how_to_run(tmp_path: Path) -> None:
    text = card(tmp_path)
    bits = sum(sum(spec.stored_bits().values()) for spec in LAYERS.values()) / (2 * 64 * 64)
    for row in (
        "| method | lcq |",
        "| bits of a code | 1 of 3, 1 of 4 |",
        "| rank of the error branch | 1 of 0, 1 of 8 |",
        f"| stored bits per weight of packed layers | {bits:.3f} in 2 layers |",
        "| weights left in float | 0.0% of the blocks, 25.0% of the model |",
        "| calibrated on | 64 windows x 512 tokens of calib.txt |",
        "| squared error of layer outputs, relative | mean 0.02, largest 0.03 |",
    ):
        assert row in text
    assert "# Small-1B, quantized" in text
    assert "/home/me" not in text
    assert "rankbook generate" in text
    assert "made from" not in text


def test_front_matter_and_text_of_the_source_stay(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(SOURCE)
    text = card(tmp_path, {**MANIFEST, "source": {"name": "owner/Small-1B", "hub_id": "owner/Small-1B"}})
    assert front(text) == {
        **{"license": "mit", "language": ["en"]},
        **{"base_model": "owner/Small-1B", "base_model_relation": "quantized"},
    }
    assert text.endswith("# Small\n\nTrained on text.\n")
    assert text.index("rankbook generate") < text.index("# Small\n")


def test_an_exported_folder_has_one_card_in_place_of_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(SOURCE.replace("license: mit", "license: mit\nbase_model: other/base"))
    card(tmp_path)
    write_export_card(tmp_path, LAYERS, MANIFEST, {"dtype": "fp16", "graph": "ort"})
    text = (tmp_path / CARD).read_text("utf-8")
    assert front(text)["base_model"] == "other/base"
    assert [text.count(part) for part in ("quantized\n", "## How to run", "| method |", "Trained on text.")] == [1] * 4
    assert "| graph | ort |" in text
    assert "AutoModelForCausalLM" not in text


def test_a_manifest_that_another_program_dropped_leaves_what_the_layers_say(tmp_path: Path) -> None:
    text = card(tmp_path, {})
    assert "| method | lcq |" in text
    assert "float" not in text


def test_a_readme_that_is_no_text_is_kept_beside_and_said(tmp_path: Path) -> None:
    (tmp_path / CARD).write_bytes(b"\xff\xfe\x00")
    with pytest.warns(Note, match=BESIDE):
        card(tmp_path)
    assert (tmp_path / BESIDE).read_bytes() == b"\xff\xfe\x00"
