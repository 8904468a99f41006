"""Every family is quantized, saved and loaded by transformers with the same logits as the records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.checkpoint.format import load_records, open_checkpoint
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.run import quantize_model
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model.loading import load_model
from rankbook.calibration.model.packed_modules import CodebookLinear
from tests.calibration.toy_method import TOY, TRAINED_TOY
from tests.tiny import FAMILIES, tiny_model, write_text


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", TOY)
    monkeypatch.setitem(METHODS, "trained-toy", TRAINED_TOY)
    monkeypatch.setitem(METHODS, "rtn", TOY)


def dense_reference(model: Any, folder: Path) -> Any:
    """The original model with each weight replaced by the decoded one."""
    for name, record in load_records(folder).items():
        module = model.get_submodule(name)
        module.weight = nn.Parameter(record.weight(with_low_rank=True))
    return model


@pytest.mark.parametrize("method", ["toy", "trained-toy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_save_load(family: str, method: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model")
    options = QuantizeOptions(
        method=method, bits=4, calib=str(write_text(tmp_path / "text.txt")), calib_sequences=4, calib_length=24
    )
    report = quantize_model(tmp_path / "model", tmp_path / "out", options)
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"}
    assert set(report.layers) == linear
    assert all(0 < layer.error < 0.1 for layer in report.layers.values() if layer.error is not None)
    ids = torch.randint(0, 256, (2, 20))
    loaded, tokenizer = load_model(tmp_path / "out")
    assert tokenizer.decode(tokenizer("quantize").input_ids) == "quantize"
    assert sum(isinstance(module, CodebookLinear) for module in loaded.modules()) == len(linear)
    assert torch.equal(loaded(ids).logits, dense_reference(model, tmp_path / "out")(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_and_head_share_one_record_where_they_are_tied(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path / "model")
    options = QuantizeOptions(
        method="toy", bits=4, calib=str(write_text(tmp_path / "text.txt")), calib_sequences=2, calib_length=24,
        quantize_embeddings=8, quantize_lm_head=8,
    )  # fmt: skip
    report = quantize_model(tmp_path / "model", tmp_path / "out", options)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert ("shared_with" in report.totals["lm_head"]) == tied
    stored = set(open_checkpoint(tmp_path / "out").files)
    assert any(name.startswith("lm_head.") for name in stored) != tied
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in stored)
    ids = torch.randint(0, 256, (2, 20))
    loaded, _ = load_model(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, dense_reference(model, tmp_path / "out")(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_stays_bfloat16(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    options = QuantizeOptions(method="trained-toy", bits=8, calib_sequences=2, calib_length=12)
    report = quantize_model(tmp_path / "model", tmp_path / "out", options)
    assert "sampled from the model itself" in report.calibration
    opened = open_checkpoint(tmp_path / "out")
    assert {opened.tensor(name).dtype for name in opened.unquantized()} == {torch.bfloat16}
    original, _ = load_model(tmp_path / "model")
    loaded, tokenizer = load_model(tmp_path / "out")
    assert tokenizer is None
    assert loaded.dtype == torch.bfloat16
    ids = torch.randint(0, 256, (2, 20))
    a, b = original(ids).logits.float(), loaded(ids).logits.float()
    # 8-bit weights (about 0.4 % error) on top of bfloat16's own 0.4 % per operation.
    assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rtn", {}),
        ("rtn", {"error_branch": "qera", "error_rank": 4}),
        ("lqer", {"error_rank": 4}),
        ("lcq", {"effort": "fast", "rank": 2}),
        ("lcq", {"rank": 1, "error_branch": "l2qer", "error_rank": 4, "method_options": {"steps": 3}}),
    ],
)
def test_every_method_goes_through(
    method: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real rtn
    model = tiny_model("llama", tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    options = QuantizeOptions(
        method=method, bits=3, group_size=16, calib=text, calib_sequences=4, calib_length=16, **settings
    )
    report = quantize_model(tmp_path / "model", tmp_path / "out", options)
    ranks = {layer.spec.branch_rank for layer in report.layers.values()}
    assert ranks == {settings.get("error_rank", 0)}
    assert {layer.spec.group for layer in report.layers.values()} == {16}
    ids = torch.randint(0, 256, (2, 20))
    loaded, _ = load_model(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, dense_reference(model, tmp_path / "out")(ids).logits)
