"""Damage to a checkpoint is found before anything in it is used, and is a sentence that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankbook.calibration.checkpoint import integrity
from rankbook.calibration.checkpoint.format import MANIFEST, CheckpointError, load_records, open_checkpoint
from rankbook.calibration.checkpoint.integrity import INDEX, WEIGHTS, Streams
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.source import Kind, identify
from tests.calibration.checkpoint.writing import write
from tests.tiny import tiny_model

AUTO: Any = AutoModelForCausalLM
Damage = Callable[[Path], None]


def edited(name: str, change: Callable[[Any], Any]) -> Damage:
    """Return what changes the contents of a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(content)))

    return damage


def in_config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Return what changes ``quantization_config``."""

    def changed(config: dict[str, Any]) -> dict[str, Any]:
        change(config["quantization_config"])
        return config

    return edited("config.json", changed)


def in_index(file: Any) -> Damage:
    """Return what makes the index say that a tensor lies elsewhere."""
    return edited(INDEX, lambda index: {**index, "weight_map": {**index["weight_map"], "norm.weight": file}})


def listed(name: str, entry: Any) -> Damage:
    """Return what changes the list of files."""
    return edited(MANIFEST, lambda manifest: {**manifest, "files": {**manifest["files"], name: entry}})


def stray(folder: Path) -> None:
    """Leave another model's weights there."""
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")


def deep(folder: Path) -> None:
    """Nest JSON deeper than Python can read."""
    (folder / "config.json").write_text("[" * 100_000)


GOOD = {"bytes": 1, "sha256": "0" * 64}
DAMAGE: dict[str, tuple[Damage, str]] = {
    "no list of files": (edited(MANIFEST, lambda m: {**m, "files": 3}), "'files' in .* holds int, not an object"),
    "a list without sizes": (listed(WEIGHTS, {"sha256": "0" * 64}), "lacks its size"),
    "a list without hashes": (listed(WEIGHTS, {"bytes": 3, "sha256": 4}), "lacks its size or its SHA-256"),
    "another folder": (listed("../other.safetensors", GOOD), "'../other.safetensors', which is not a plain name"),
    "an absolute path": (listed("/etc/passwd", GOOD), "not a plain name"),
    "a detour": (listed("a/../config.json", GOOD), "not a plain name"),
    "weights not listed": (stray, "holds other.safetensors, which its rankbook.json does not list"),
    "notes on layers": (edited(MANIFEST, lambda m: {**m, "layers": []}), "'layers' in .* holds list"),
    "no settings": (edited("config.json", lambda c: {**c, "quantization_config": None}), "holds NoneType"),
    "layers as a list": (in_config(lambda q: q.update(layers=[])), "'layers' in .* holds list"),
    "a layer as a number": (in_config(lambda q: q["layers"].update(head=3)), "layer 'head' is int, not an object"),
    "a width as text": (in_config(lambda q: q["layers"]["head"].update(bits="3")), "bits is '3'; it must be int"),
    "a huge layer": (in_config(lambda q: q["layers"]["head"].update(in_features=2**60)), "in_features is"),
    "a loop of sharing": (in_config(lambda q: q["layers"]["head"].update(shared_with="head")), "shares the tensors"),
    "sharing with nobody": (in_config(lambda q: q["layers"]["head"].update(shared_with="?")), "shares the tensors"),
    "deep JSON": (deep, "cannot be read"),
    "an unknown layer": (
        in_config(lambda q: q["layers"].update(ghost=q["layers"]["blocks.0.linear"])),
        "there is no layer 'ghost'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "out")
    change, message = DAMAGE[damage]
    change(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("file", ["../../other.safetensors", "/tmp/x.safetensors", "config.json", 3, None])
def test_the_index_names_only_weights_of_this_folder(tmp_path: Path, file: object) -> None:
    write(tmp_path / "out", 3000)
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "other.safetensors")
    in_index(file)(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    size = (tmp_path / "out" / INDEX).stat().st_size
    listed(INDEX, {**manifest["files"][INDEX], "bytes": size})(tmp_path / "out")
    with pytest.raises(CheckpointError, match="which is not a file of weights in this folder"):
        open_checkpoint(tmp_path / "out")


def resized(folder: Path) -> None:
    """Make the manifest agree with what the weights are now, as somebody does who means harm."""
    import hashlib

    data = (folder / WEIGHTS).read_bytes()
    listed(WEIGHTS, {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.0.linear.step", float("nan"), "blocks.0.linear.step holds NaN"),
        ("blocks.0.linear.base", float("inf"), "blocks.0.linear.base holds NaN or infinity"),
        ("blocks.6.linear.params", 7, "params is a placeholder and must hold 1"),
        ("norm.weight", float("nan"), "norm.weight holds NaN"),
    ],
)
def test_numbers_that_nothing_can_compute_with(tmp_path: Path, name: str, value: float, message: str) -> None:
    write(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    tensors[name].view(-1)[0] = value
    save_file(tensors, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"SHA-256 differs"):
        open_checkpoint(tmp_path / "out", verify=True)
    resized(tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out", verify=True)
    with pytest.raises(CheckpointError, match=message):
        opened.tensor(name) if name == "norm.weight" else load_records(tmp_path / "out")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A quantized model with a bias."""
    tiny_model("llama", tmp_path / "model")
    options = QuantizeOptions(method="rtn", bits=4, calib_sequences=2, calib_length=8, quantize_embeddings=8)
    quantize_model(tmp_path / "model", tmp_path / "out", options)
    return tmp_path / "out"


def test_transformers_refuses_damaged_numbers(checkpoint: Path) -> None:
    name = "model.layers.1.mlp.up_proj.step"
    tensors = load_file(checkpoint / WEIGHTS)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        AUTO.from_pretrained(checkpoint)


def test_a_checkpoint_that_transformers_saved_again_is_one(checkpoint: Path, tmp_path: Path) -> None:
    AUTO.from_pretrained(checkpoint).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert not (tmp_path / "again" / MANIFEST).exists()
    assert identify(tmp_path / "again").kind is Kind.CHECKPOINT
    opened = open_checkpoint(tmp_path / "again", verify=True)
    assert "saved again" in opened.manifest["note"]
    before = load_records(checkpoint)
    after = {name: opened.record(name) for name in opened.layers}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].weight(), before[name].weight()) for name in before)
    ids = torch.arange(60, 72)[None]
    assert torch.equal(load_model(tmp_path / "again")[0](ids).logits, load_model(checkpoint)[0](ids).logits)
    stray(tmp_path / "again")
    with pytest.raises(CheckpointError, match="of which no tensor is used"):
        open_checkpoint(tmp_path / "again")


@pytest.mark.parametrize(("piece_bytes", "openings"), [(0, 4), (64, 2), (1 << 20, 1)])
def test_files_stay_open_until_much_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int, openings: int
) -> None:
    path, found = tmp_path / WEIGHTS, list[Path]()
    tensors = {f"t{index}": torch.full((8,), float(index)) for index in range(4)}  # of 32 bytes
    save_file(tensors, path)

    def counting(*args: Any, **kwargs: Any) -> Any:
        found.append(path)
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(integrity, "safe_open", counting)
    streams = Streams(piece_bytes)
    for name, tensor in tensors.items():
        assert torch.equal(streams.tensor(path, name), tensor)
    assert len(found) == openings
    with pytest.raises(CheckpointError, match="cannot be read"):
        streams.tensor(path, "t4")


def test_what_was_read_of_all_open_files_counts(tmp_path: Path) -> None:
    """Of a model in many files each would keep its pages in memory, and its place among the open files."""
    streams, paths = Streams(64), [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        save_file({"t": torch.arange(8.0)}, path)
    assert torch.equal(streams.tensor(paths[0], "t"), torch.arange(8.0))
    paths[0].unlink()
    assert torch.equal(streams.tensor(paths[0], "t"), torch.arange(8.0))  # 64 bytes: closed behind this one
    assert torch.equal(streams.tensor(paths[1], "t"), torch.arange(8.0))
    with pytest.raises(CheckpointError, match="a cannot be read"):
        streams.tensor(paths[0], "t")
