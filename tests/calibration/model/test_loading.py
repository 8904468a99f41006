"""What counts as a model, and clear words for what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model.loading import load_model, load_tokenizer, model_hash, resolve
from rankbook.calibration.source import Kind, Source, identify
from tests.calibration import toy_method
from tests.gguf_files import write_gguf
from tests.tiny import tiny_model


def test_kinds_of_source(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "hf")
    assert resolve(tmp_path / "hf") == Source(Kind.MODEL, str(tmp_path / "hf"))
    assert resolve("owner/name") == Source(Kind.HUB, "owner/name")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve(tmp_path / "a.gguf") == resolve(tmp_path) == Source(Kind.GGUF, str(tmp_path), "a.gguf")
    (tmp_path / "hf" / "rankbook.json").write_text("{}")
    assert resolve(tmp_path / "hf").packed


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json and no \.gguf file"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        resolve(tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, but not of a kind .* a \.gguf file"):
        resolve(tmp_path / "model.bin")
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files \(a\.gguf, b\.gguf\)"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "file"),
    [
        (["engine.json", "model.engine"], Kind.ENGINE, "model.engine"),
        (["model.onnx", "config.json"], Kind.ONNX, "model.onnx"),
        (["other.onnx", "config.json"], Kind.ONNX, "other.onnx"),
        (["other.onnx", "config.json", "model.safetensors"], Kind.MODEL, ""),
        (["rankbook.json", "config.json", "model.safetensors"], Kind.CHECKPOINT, ""),
    ],
)
def test_a_folder_is_one_thing(files: list[str], kind: Kind, file: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert identify(tmp_path) == Source(kind, str(tmp_path), file)


def test_what_the_caller_cannot_use_is_not_found(tmp_path: Path) -> None:
    for name in ("model.onnx", "config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert identify(tmp_path).kind is Kind.ONNX
    assert resolve(tmp_path).kind is Kind.MODEL
    with pytest.raises(ValueError, match=r"holds no engine\.json; give an engine folder"):
        identify(tmp_path, {Kind.ENGINE})


@pytest.mark.parametrize("name", ["checkpoint", "out/checkpoint", "../x", "a/b/c"])
def test_a_missing_folder_is_no_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id has an owner, unless the model is in the cache already; the owner is no folder here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ValueError, match=r"does not exist; .* named owner/name"):
        identify(name)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/cache/config.json")
    if "/" not in name:
        assert identify(name) == Source(Kind.HUB, name)


def test_damaged_models(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"its weights have 1000 bytes; one of them is damaged"):
        load_model(tmp_path / "model")
    weights.unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / "model" / "pytorch_model.bin")  # pickled weights are not read
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path / "model")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(tmp_path / "broken.gguf")


def test_a_shard_that_ends_too_early_is_named(tmp_path: Path) -> None:
    """Or one that is missing; nothing is left of the output."""
    tiny_model("llama").save_pretrained(tmp_path / "model", max_shard_size="40KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    whole = shards[1].read_bytes()
    chosen = QuantizeOptions(method="rtn")
    for left in (whole[:-100], None):
        shards[1].write_bytes(left) if left else shards[1].unlink()
        with pytest.raises(ValueError, match=rf"cannot be loaded as a causal language model: .*{shards[1].name}"):
            quantize_model(tmp_path / "model", tmp_path / "q", chosen)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="tokenizer of .* cannot be read"):
        assert load_tokenizer(tmp_path) is None


def test_native_dtype_is_kept_and_can_be_changed(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert model.dtype == torch.bfloat16
    assert tokenizer is None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert load_model(tmp_path, torch.float32)[0].dtype == torch.float32


def test_hash_follows_weights_and_configuration(tmp_path: Path) -> None:
    tiny_model("llama", tmp_path)
    before = model_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("of no matter")
    assert model_hash(tmp_path) == before
    tiny_model("llama", tmp_path, seed=1)
    assert model_hash(tmp_path) != before


def test_gguf_is_quantized_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", toy_method.TOY)
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf")
    assert load_tokenizer(tmp_path / "model")("012").input_ids == [0, 1, 2]
    model, _ = load_model(tmp_path / "model" / "tiny.gguf")
    options = QuantizeOptions(method="toy", bits=8, calib_sequences=2, calib_length=8)
    report = quantize_model(tmp_path / "model", tmp_path / "out", options)
    assert len(report.layers) == 7
    loaded, tokenizer = load_model(tmp_path / "out")
    assert tokenizer("012").input_ids == [0, 1, 2]
    ids = torch.arange(10)[None]
    a, b = model(ids).logits, loaded(ids).logits
    assert (a - b).norm() < 0.02 * a.norm()  # 8-bit weights: about 0.4 % error each
