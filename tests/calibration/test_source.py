"""What a path is: by its marks, in a fixed order, or a sentence that names what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankbook.calibration.source import LOADABLE, Kind, identify, is_checkpoint


@pytest.mark.parametrize(
    ("files", "kind", "file"),
    [
        (("config.json", "model.safetensors"), Kind.MODEL, ""),
        (("config.json", "rankbook.json"), Kind.CHECKPOINT, ""),
        (("config.json", "model.onnx"), Kind.ONNX, "model.onnx"),
        (("other.onnx",), Kind.ONNX, "other.onnx"),
        (("config.json", "other.onnx", "model.safetensors"), Kind.MODEL, ""),  # a model with an ONNX file of somebody
        (("model.engine", "engine.json", "model.onnx"), Kind.ENGINE, "model.engine"),
        (("a.gguf",), Kind.GGUF, "a.gguf"),
    ],
)
def test_a_folder_is_what_its_files_say(files: tuple[str, ...], kind: Kind, file: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    found = identify(tmp_path)
    assert (found.kind, found.file, found.location) == (kind, file, str(tmp_path))
    assert found.path == tmp_path / file


def test_a_checkpoint_without_its_manifest_is_known_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "rankbook"}}))
    assert not is_checkpoint(tmp_path)  # no weights
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert not is_checkpoint(tmp_path)


def test_files_are_known_by_their_ends(tmp_path: Path) -> None:
    for name, kind in (("a.gguf", Kind.GGUF), ("b.onnx", Kind.ONNX), ("c.engine", Kind.ENGINE)):
        (tmp_path / name).write_bytes(b"")
        assert identify(tmp_path / name).kind is kind
    with pytest.raises(ValueError, match="is a file, but not of a kind that can be used; give a checkpoint"):
        identify(tmp_path / "b.onnx", LOADABLE)


def test_what_is_not_there_is_said_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; give an engine folder$"):
        identify(tmp_path / "nothing", {Kind.ENGINE})
    with pytest.raises(
        ValueError, match=r"holds no rankbook\.json and no config\.json; give a checkpoint or a Hugging"
    ):
        identify(tmp_path, {Kind.CHECKPOINT, Kind.MODEL})
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files \(a\.gguf, b\.gguf\); name the one"):
        identify(tmp_path)


def test_a_name_with_an_owner_is_one_of_the_hub() -> None:
    assert identify("somebody/some-model").kind is Kind.HUB
    with pytest.raises(ValueError, match="named owner/name"):
        identify("no-such-folder/with/three", LOADABLE)
