"""Text becomes windows of tokens; what cannot become any is refused with the reason."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from rankbook.calibration.data import calibration_batches, read_text, sample_from_model, token_windows
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer, write_text


def test_windows_are_the_text_without_its_end() -> None:
    text = "abcdefghij" * 5
    windows = token_windows(tiny_tokenizer(), text, 8)
    assert windows.shape == (6, 8)
    assert tiny_tokenizer().decode(windows.flatten()) == text[:48]


def test_a_tokenizer_that_begins_with_a_special_token_begins_every_window() -> None:
    class WithStart:
        bos_token_id = 7

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + [ord(letter) for letter in text]}

    windows = token_windows(WithStart(), "abcdefg", 4)
    assert windows.tolist() == [[7, 97, 98, 99], [7, 100, 101, 102]]


def test_more_windows_than_asked_for_are_sampled_by_seed(tmp_path: Path) -> None:
    source = write_text(tmp_path / "text.txt", 2000)
    take = {"sequences": 4, "length": 16}
    first = calibration_batches(tiny_tokenizer(), source, seed=0, **take)
    assert first.tokens.shape == (4, 16)
    assert torch.equal(first.tokens, calibration_batches(tiny_tokenizer(), source, seed=0, **take).tokens)
    assert not torch.equal(first.tokens, calibration_batches(tiny_tokenizer(), source, seed=1, **take).tokens)
    assert first.description.startswith("4 windows x 16 tokens of")


def test_a_short_text_gives_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abcde")
    data = calibration_batches(tiny_tokenizer(), tmp_path / "short.txt", sequences=4, length=16)
    assert data.tokens.shape == (1, 5)


def test_sampling_is_seeded_and_begins_with_the_start_token() -> None:
    model = tiny_model("llama")
    tokens = sample_from_model(model, 20, 6, seed=0)
    assert tokens.shape == (20, 6)
    assert (tokens[:, 0] == 256).all()
    assert torch.equal(tokens, sample_from_model(model, 20, 6, seed=0))
    assert not torch.equal(tokens, sample_from_model(model, 20, 6, seed=1))
    assert len({tuple(row) for row in tokens.tolist()}) == 20


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_sampling_with_a_cache_follows_the_model(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        parameter = model.get_input_embeddings().weight
        parameter.mul_(50)  # distributions so sharp that the likeliest token is drawn nearly always
    tokens = sample_from_model(model, 2, 12, seed=0)
    probabilities = model(tokens).logits[:, :-1].double().softmax(-1)
    drawn = probabilities.gather(2, tokens[:, 1:, None])
    assert (drawn > 1e-4).all()


def test_sampling_without_a_start_token() -> None:
    tokens = sample_from_model(tiny_model("llama", bos_token_id=None), 8, 3, seed=0)
    assert len(set(tokens[:, 0].tolist())) > 1
    assert int(tokens.max()) < VOCABULARY


def test_no_text_samples_and_says_so() -> None:
    data = calibration_batches(None, None, sequences=2, length=4, model=tiny_model("llama"))
    assert "sampled from the model itself" in data.description


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", "two")) + "\n\n")
    assert read_text(path) == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"text":')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_text(path)
    path.write_text('{"content": "one"}')
    with pytest.raises(ValueError, match="line 1 has no field 'text'"):
        read_text(path)


def test_a_dataset_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        column_names = ("text",)

        def __getitem__(self, name: str) -> list[str]:
            return ["one", "two"]

    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Rows:
        asked.append((args, kwargs))
        return Rows()

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_text("wikitext:wikitext-2-raw-v1:test") == "one\n\ntwo"
    assert asked == [(("wikitext", "wikitext-2-raw-v1"), {"split": "test"})]
    Rows.column_names = ("content",)
    with pytest.raises(ValueError, match="none of them 'text'"):
        read_text("wikitext")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"nowhere\.txt is not a file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        calibration_batches(tiny_tokenizer(), tmp_path / "empty.txt", sequences=1, length=4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="has 1 tokens"):
        calibration_batches(tiny_tokenizer(), tmp_path / "a.txt", sequences=1, length=4)
    with pytest.raises(ValueError, match="no tokenizer"):
        calibration_batches(None, write_text(tmp_path / "b.txt"), sequences=1, length=4)
    with pytest.raises(ValueError, match="do not belong together"):
        calibration_batches(
            tiny_tokenizer(),
            tmp_path / "b.txt",
            sequences=1,
            length=4,
            model=tiny_model("llama", vocab_size=50, pad_token_id=1),
        )
