"""Embedding and output layer: rounding in pieces, and every combination of tied and wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rankbook.calibration.driver import embeddings
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.fitting.problem import LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import Embeddings, adapter_of
from rankbook.calibration.model.packed_modules import CodebookEmbedding, CodebookLinear, TiedCodebookLinear
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins.forms import Form
from tests.tiny import tiny_model


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_give_what_one_call_gives(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_ROWS_AT_ONCE", 64)
    weight = torch.randn(259, 48)
    options = QuantizeOptions(method="rtn")
    record = embeddings.quantize_rows("embedding", weight, torch.ones(259), bits, options)
    rtn = METHODS["rtn"]
    problem = LayerProblem("embedding", weight, None, LayerStatistics.empty(48))
    whole = rtn.quantize(problem, rtn.config_type(bits=bits, group_size=48))
    assert torch.equal(record.weight(), whole.weight())
    assert record.bias is not None


def correlated_inputs(size: int) -> LayerStatistics:
    """Statistics of inputs that move together, as hidden states do."""
    found = LayerStatistics.empty(size)
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(4, size, generator=generator)
    found.update(torch.randn(500, 4, generator=generator) @ common + 0.3 * torch.randn(500, size, generator=generator))
    return found


@pytest.mark.parametrize(("method", "written"), [("rtn", "gptq"), ("lcq", "lcq")])
def test_four_bits_are_fitted_to_what_enters(method: str, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less error in the output than rounding to nearest; every piece of a large embedding has the same levels."""
    monkeypatch.setattr(embeddings, "_ROWS_AT_ONCE", 64)
    weight, inputs = torch.randn(150, 48, generator=torch.Generator().manual_seed(1)), correlated_inputs(48)
    options = QuantizeOptions(method=method, group_size=16)

    def error(record: QuantizedLinear) -> float:
        off = record.weight() - weight
        return float(torch.einsum("nk,kj,nj->", off, inputs.gram, off))

    rtn = METHODS["rtn"]
    problem = LayerProblem("embedding", weight, None, inputs)
    rounded = rtn.quantize(problem, rtn.config_type(bits=4, group_size=16))
    fitted = embeddings.quantize_rows("embedding", weight, None, 4, options, inputs)
    assert fitted.method == written
    assert error(fitted) < 0.1 * error(rounded)  # 0.044 and 0.035 here


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["rtn", "lcq"])
def test_the_storage_is_what_the_options_say(bits: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_ROWS_AT_ONCE", 64)
    weight = torch.randn(150, 48, generator=torch.Generator().manual_seed(1))
    options = QuantizeOptions(method=method, group_size=16, param_bits=16, level_dtype="float16")
    record = embeddings.quantize_rows("embedding", weight, None, bits, options)
    assert record.params.form is Form.FLOAT16
    fitted = bits == 4 and method == "lcq"  # what is rounded to a grid has integers as levels
    assert record.levels.dtype == (torch.float16 if fitted else torch.int8)


def test_what_enters_the_output_layer_is_measured() -> None:
    """The Gram matrix is that of the last norm's output; a tied embedding is fitted to it."""
    model = tiny_model("qwen3")
    tokens = torch.arange(64).view(2, 32)
    found = adapter_of(model).embeddings()
    assert found.head is not None
    inputs = capture.entering(model, adapter_of(model).blocks(), found.head[1], tokens)
    hidden = model.model(tokens).last_hidden_state.flatten(0, 1)
    assert inputs.tokens == 64
    torch.testing.assert_close(inputs.gram, (hidden.T @ hidden).detach(), rtol=1e-4, atol=1e-3)
    options = QuantizeOptions(method="lcq", quantize_lm_head=4)
    assert embeddings.wants_statistics(found, options)
    assert not embeddings.wants_statistics(found, QuantizeOptions(method="lcq", quantize_lm_head=8))
    ids = torch.arange(10)[None]
    want = model(ids).logits.detach()

    def error(statistics: LayerStatistics | None) -> float:
        model = tiny_model("qwen3")
        embeddings.quantize_embedding(adapter_of(model), adapter_of(model).embeddings(), options, statistics)
        return float((model(ids).logits.detach() - want).norm())

    assert error(inputs) != error(None)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_model_in_half_precision_is_measured_in_float32(family: str) -> None:
    """Its weights are what they are; nothing else is rounded, and the model is left as it was."""
    model = tiny_model(family).half()
    tokens = torch.arange(64).view(2, 32)
    head = model.get_output_embeddings()
    measured = capture.entering(model, adapter_of(model).blocks(), head, tokens)
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float16}
    model.float()
    want = capture.entering(model, adapter_of(model).blocks(), head, tokens)
    torch.testing.assert_close(measured.gram, want.gram, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("tokens", "head"), [(8, 0), (0, 8), (4, 4)])
def test_combinations(family: str, tokens: int, head: int) -> None:
    model = tiny_model(family)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    options = QuantizeOptions(method="rtn", quantize_embeddings=tokens, quantize_lm_head=head)
    adapter = adapter_of(model)
    found = adapter.embeddings()
    assert found.tied == tied == (family == "qwen3")
    embeddings.check_embeddings(adapter, found, options)
    ids = torch.arange(10)[None]
    want = model(ids).logits
    specs = embeddings.quantize_embedding(adapter, found, options)
    specs |= embeddings.quantize_head(adapter, found, options)
    if tied:  # one record for both, whichever was asked for
        assert isinstance(model.model.embed_tokens, CodebookEmbedding)
        assert isinstance(model.lm_head, TiedCodebookLinear)
        assert specs["lm_head"].shared_with == "model.embed_tokens"
    else:
        assert isinstance(model.model.embed_tokens, CodebookEmbedding if tokens else nn.Embedding)
        assert isinstance(model.lm_head, CodebookLinear if head else nn.Linear)
        assert set(specs) == {n for n, w in (("model.embed_tokens", tokens), ("lm_head", head)) if w}
    bits = max(tokens, head)
    # Rounding to b bits over a range of about 5 standard deviations: an error of 5 / (sqrt(12) 2^b) of the weights.
    assert (model(ids).logits - want).norm() < 4 * 5 / (12**0.5 * 2**bits) * want.norm()


def test_scaled_embeddings_keep_their_factor() -> None:
    model = tiny_model("gemma2")
    ids = torch.arange(10)[None]
    want = model.model.embed_tokens(ids)
    options = QuantizeOptions(method="rtn", quantize_embeddings=8)
    embeddings.quantize_embedding(adapter_of(model), adapter_of(model).embeddings(), options)
    assert (model.model.embed_tokens(ids) - want).norm() < 0.02 * want.norm()


def test_refusals(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    adapter = adapter_of(model)
    found, mixed = adapter.embeddings(), QuantizeOptions(method="rtn", quantize_embeddings=4, quantize_lm_head=8)
    with pytest.raises(ValueError, match="4 and 8 bits cannot both be had"):
        embeddings.check_embeddings(adapter, found, mixed)

    class Odd(nn.Embedding):
        pass

    model.model.embed_tokens.__class__ = Odd
    with pytest.raises(ValueError, match="embeddings of type Odd cannot be quantized"):
        embeddings.check_embeddings(adapter, found, QuantizeOptions(method="rtn", quantize_embeddings=4))
    headless = Embeddings(found.embedding, None, tied=False)
    with pytest.raises(ValueError, match="no plain output layer"):
        embeddings.check_embeddings(adapter, headless, QuantizeOptions(method="rtn", quantize_lm_head=8))
