"""What a model folder has beside weights goes along; what leads out of it, or is too large, is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from rankbook.calibration.checkpoint import extras
from rankbook.calibration.checkpoint.extras import copy_extras, settle_tokenizer
from rankbook.calibration.notes import Note

BELONG = (
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "LICENSE", "README.md", "own.py"),
    *("tokenizer.model", "vocab.txt", "additional_chat_templates/tool.jinja", "code/a/deep.py"),
)
STAY = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json", ".gitattributes"),
    *("quantize_config.json", "rankbook.json", "rankbook-files.json", ".git/config", "__pycache__/own.pyc"),
    *("checkpoint-500/optimizer.pt", "checkpoint-500/trainer_state.json", "onnx/model.onnx", "model.Q4.gguf"),
)


def folder(path: Path) -> Path:
    for name in (*BELONG, *STAY):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return path


def copied(path: Path) -> set[str]:
    return {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_file()}


def test_everything_but_weights_goes_along(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        copy_extras(folder(tmp_path / "model"), tmp_path / "out")
    assert copied(tmp_path / "out") == set(BELONG)
    assert all((tmp_path / "out" / name).read_text() == name for name in BELONG)
    copy_extras(tmp_path / "model", tmp_path / "out", also=("config.json",))
    assert copied(tmp_path / "out") == {*BELONG, "config.json"}


def test_links_are_followed_within_the_folder_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("mine")
    model = folder(tmp_path / "model")
    (model / "inner.txt").symlink_to("LICENSE")
    (model / "outer.txt").symlink_to(secret)
    (model / "folder").symlink_to(tmp_path)
    (model / "broken.txt").symlink_to("nothing")
    with pytest.warns(Note, match=r"lead out of .*: broken\.txt, folder, outer\.txt"):
        copy_extras(model, tmp_path / "out")
    assert copied(tmp_path / "out") == {*BELONG, "inner.txt"}
    assert not (tmp_path / "out" / "inner.txt").is_symlink()


def test_the_cache_of_the_hub_links_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1234").mkdir(parents=True)
    (cache / "blobs" / "abc").write_text("a licence")
    (cache / "snapshots" / "1234" / "LICENSE").symlink_to("../../blobs/abc")
    (tmp_path / "link").symlink_to(cache / "snapshots" / "1234")
    copy_extras(tmp_path / "link", tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "a licence"


def test_what_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "MOST_BYTES", 15)
    with pytest.warns(Note, match=r"left behind in .*, beyond .*: chat_template\.jinja, .* and 1 more"):
        copy_extras(folder(tmp_path / "model"), tmp_path / "out")
    assert copied(tmp_path / "out") == {name for name in BELONG if len(name) <= 15}


def test_a_tokenizer_that_older_versions_of_transformers_read(tmp_path: Path) -> None:
    """Names of version 5 become those of before, and version 5 reads the same tokenizer as ever."""
    from rankbook.calibration.model.tokenizer import read_tokenizer
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<one>", "<two>"]})
    tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    written = json.loads(settings.read_text())
    assert (written["tokenizer_class"], written["extra_special_tokens"]) == ("TokenizersBackend", ["<one>", "<two>"])
    settle_tokenizer(tmp_path)
    found = json.loads(settings.read_text())
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert found["model_input_names"] == ["input_ids", "attention_mask"]
    assert found["additional_special_tokens"] == ["<one>", "<two>"]
    assert "extra_special_tokens" not in found
    again = read_tokenizer(str(tmp_path))
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again("a<one>b").input_ids == tokenizer("a<one>b").input_ids
    before = settings.read_bytes()
    settle_tokenizer(tmp_path)
    assert settings.read_bytes() == before
    settle_tokenizer(tmp_path / "nothing")
