"""Packed modules compute what their records say, in every stored form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rankbook.calibration.model.packed_modules import (
    CodebookEmbedding,
    CodebookLinear,
    TiedCodebookLinear,
    materialize_all,
    packed_modules,
    replace_module,
)
from rankbook.plugins.layer_spec import LayerSpec
from tests.calibration.records import FORMS, random_record

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_the_product_with_the_decoded_weight(form: str) -> None:
    record = random_record(**FORMS[form])
    x = torch.randn(2, 3, record.in_features)
    want = nn.functional.linear(x, record.weight(with_low_rank=True), record.bias)
    layer = CodebookLinear.from_record(record)
    assert torch.equal(layer(x), want)
    layer.materialize()
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("form", FORMS)
def test_spec_has_the_names_shapes_and_dtypes_of_the_packed_record(form: str) -> None:
    record = random_record(**FORMS[form])
    packed = {n: (tuple(t.shape), f"{t.dtype}") for n, t in record.pack().items()}
    assert packed == {n: (t.shape, f"torch.{t.dtype}") for n, t in record.spec().tensors().items()}


@pytest.mark.parametrize("form", FORMS)
def test_spec_survives_json(form: str) -> None:
    spec = random_record(**FORMS[form]).spec()
    assert LayerSpec.from_json("layer", spec.to_json()) == spec


def test_unknown_field_of_a_layer_is_named() -> None:
    entry: dict[str, Any] = {**random_record().spec().to_json(), "colour": 3}
    with pytest.raises(ValueError, match="colour"):
        LayerSpec.from_json("layer", entry)


def test_wrong_tensor_is_named() -> None:
    record = random_record()
    tensors = record.pack()
    tensors["step"] = tensors["step"].half()
    with pytest.raises(ValueError, match="step"):
        CodebookLinear(record.spec(), tensors)


def test_a_cast_of_the_model_leaves_the_packed_tensors_alone() -> None:
    record = random_record(bias=True, rank=3)
    layer = CodebookLinear.from_record(record).to(torch.bfloat16)
    packed, original = layer.packed(), record.pack()
    assert all(packed[name].dtype == original[name].dtype for name in original if name != "bias")
    assert packed["bias"].dtype == layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, record.weight(with_low_rank=True).bfloat16())
    assert layer(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_holds_exactly_the_packed_tensors() -> None:
    record = random_record(bias=True, rank=3)
    assert set(CodebookLinear.from_record(record).state_dict()) == set(record.pack())


@pytest.mark.parametrize("form", ["plain", "one row panel", "odd sizes", "fp16 params", "8 bits"])
@pytest.mark.parametrize("rows", [32, 33, 100])
def test_embedding_returns_rows_of_the_decoded_weight(form: str, rows: int) -> None:
    record = random_record(**{**FORMS[form], "out_features": rows})
    layer = CodebookEmbedding.from_record(record, scale=0.5)
    ids = torch.tensor([[0, rows - 1], [31, 0]])
    assert torch.equal(layer(ids), record.weight()[ids] * 0.5)
    layer.materialize()
    assert torch.equal(layer(ids), record.weight()[ids] * 0.5)


def test_tied_layer_shares_the_tensors_of_its_embedding() -> None:
    record = random_record(70)
    model: Any = nn.Module()
    model.embedding = CodebookEmbedding.from_record(record)
    model.head = TiedCodebookLinear(model.embedding)
    assert not [name for name in model.state_dict() if name.startswith("head")]
    x = torch.randn(2, 48)
    assert torch.equal(model.head(x), x @ record.weight().T)
    copied = copy.deepcopy(model)
    assert copied.head.source is copied.embedding
    assert torch.equal(copied.head.record().weight(), record.weight())


def test_materialize_and_back() -> None:
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU())
    replace_module(model, "0", CodebookLinear.from_record(random_record(48)))
    assert list(packed_modules(model)) == ["0"]
    materialize_all(model)
    assert model[0].weight is model[0].weight
    layer: Any = model[0]
    layer.dematerialize()
    assert model[0].weight is not model[0].weight
