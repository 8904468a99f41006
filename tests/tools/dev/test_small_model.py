"""The small model of the accuracy table: it can be trained, quantized like any other, and is never half-written."""

from __future__ import annotations

from rankbook.calibration.model.loading import load_model
from rankbook.tools import errors
from rankbook.tools.dev import small_model
from tests.tiny import write_text


def test_training_needs_a_new_folder_and_some_steps(tmp_path, capsys):
    text = str(write_text(tmp_path / "c.txt", 2000))
    assert small_model.main(["--text", text, "-o", str(tmp_path)]) == errors.USAGE
    assert small_model.main(["--text", text, "-o", str(tmp_path / "new"), "--steps", "5"]) == errors.USAGE
    assert "20 or more" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_trained_model_predicts_its_text_better_than_chance(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(small_model, "_LENGTH", 64)

    text = write_text(tmp_path / "c.txt", 60_000)
    assert small_model.main(["--text", str(text), "-o", str(tmp_path / "model"), "--steps", "20"]) == 0
    model, tokenizer = load_model(tmp_path / "model", torch.float32)
    tokens = torch.tensor([tokenizer(text.read_text())["input_ids"][:64]])
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    # Chance is log(2048) = 7.6 nats.
    assert loss < 6.5
