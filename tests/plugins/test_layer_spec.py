"""The description of a layer: what it says is what records pack, in every form; anything else is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.exporter.dialects.rankbook import attributes
from rankbook.plugins import contract
from rankbook.plugins.forms import Form, TensorSpec
from rankbook.plugins.layer_spec import LayerSpec
from tests.calibration.records import random_record
from tests.ops.cases import constants_of

FORM_BITS = st.sampled_from([8, 16, 32])
RECORDS = st.fixed_dictionaries(
    {
        "out_features": st.integers(1, 70),
        "in_features": st.sampled_from([16, 32, 48, 64, 96]),
        "bits": st.sampled_from([2, 3, 4, 8]),
        "planes": st.integers(1, 3),
        "has_offset": st.booleans(),
        "param_bits": FORM_BITS,
        "float_levels": st.booleans(),
        "bias": st.booleans(),
        "rank": st.sampled_from([0, 1, 5]),
        "factor_bits": FORM_BITS,
    }
)
SPEC = LayerSpec("linear", "rtn", 3, 40, 48, 16, 2, True, branch_rank=4, bias="float32")


def described(tensors: dict[str, Any]) -> dict[str, TensorSpec]:
    """Return shape and type of arrays of numpy or torch."""
    return {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}


def without_values(tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the same without what placeholders hold."""
    return {name: replace(tensor, value=None) for name, tensor in tensors.items()}


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_every_form_packs_as_described_and_comes_back(arguments: dict[str, Any]) -> None:
    record = random_record(**arguments)
    spec, packed = record.spec(), record.pack()
    assert described(packed) == without_values(spec.tensors())
    spec.check(packed)
    assert spec.stored_bits() == {name: 8 * t.nbytes for name, t in packed.items() if name != "bias"}
    again = QuantizedLinear.unpack(packed, spec)
    assert again.spec() == spec
    assert torch.equal(again.weight(with_low_rank=True), record.weight(with_low_rank=True))
    repacked = again.pack()
    assert all(torch.equal(repacked[name], packed[name]) for name in packed)
    assert LayerSpec.from_json("layer", spec.to_json()) == spec


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.booleans())
def test_the_form_is_read_back_from_the_constants_of_an_operator(arguments: dict[str, Any], gather: bool) -> None:
    record = random_record(**arguments if not gather else {**arguments, "rank": 0, "bias": False})
    spec = record.spec("embedding" if gather else "linear")
    kind = contract.GATHER if gather else contract.matmul_kind(low_rank=bool(spec.branch_rank), int8_activations=False)
    constants = constants_of(record, contract.PACKED[contract.op_name(kind, spec.bits)])
    assert described(constants) == without_values(spec.constants())
    found = LayerSpec.of_constants(spec.bits, attributes(spec), described(constants), spec.kind)
    bias = found.bias if spec.out_features == 1 else spec.bias  # one row: a bias of one element, there or not
    assert found == replace(spec, method="", level_dtype="float16", bias=bias)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.randoms(use_true_random=False))
def test_every_other_shape_or_type_is_refused(arguments: dict[str, Any], random: Any) -> None:
    record = random_record(**arguments)
    spec, packed = record.spec(), record.pack()
    for name, tensor in packed.items():
        axis = random.randrange(tensor.ndim)
        longer = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        for wrong in (longer, tensor[None], tensor.double()):
            with pytest.raises(ValueError, match=f"layer.{name} is .*asks for"):
                spec.check({**packed, name: wrong})
        with pytest.raises(ValueError, match=f"lacks the tensor '{name}'"):
            spec.check({part: t for part, t in packed.items() if part != name})
        if tensor.is_floating_point():
            for bad in (torch.nan, torch.inf):
                damaged = tensor.clone()
                damaged.view(-1)[random.randrange(tensor.numel())] = bad
                with pytest.raises(ValueError, match=f"layer.{name} (holds NaN|is a placeholder)"):
                    spec.check({**packed, name: damaged})


def test_a_placeholder_must_change_nothing() -> None:
    record = random_record(param_bits=16, rank=2, factor_bits=16)
    packed = record.pack()
    for name, value in (("params", 2), ("base", 0.5), ("down", 0), ("up", -1)):
        with pytest.raises(ValueError, match=f"{name} is a placeholder and must hold"):
            record.spec().check({**packed, name: torch.full_like(packed[name], value)})


def test_numpy_arrays_are_checked_as_well() -> None:
    packed = {name: tensor.numpy() for name, tensor in random_record(param_bits=32).pack().items()}
    spec = random_record(param_bits=32).spec()
    spec.check(packed)
    packed["step"][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="step holds NaN"):
        spec.check(packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": TensorSpec((1, 1), "int8")}, "up int8 .1, 1.*allowed are"),  # the lie of a factor of one element
        ({"down": TensorSpec((1, 1), "int8")}, "allowed are"),
        ({"step": TensorSpec((2, 3, 3, 32), "float32")}, "allowed are"),  # codes and full steps
        ({"step": TensorSpec((2, 1, 3, 1), "float16")}, "allowed are"),
        ({"params": TensorSpec((2, 5, 3, 32), "int8")}, "5 groups do not divide"),
        ({"levels": TensorSpec((1, 8), "float16")}, "allowed are"),
        ({"bias": TensorSpec((7,), "float32")}, "bias float32 .7"),
        ({"codes": TensorSpec((2, 2, 4, 32, 4), "int8")}, "codes int8"),
        ({"up_scale": TensorSpec((0, 4), "float32")}, "allowed are"),
    ],
)
def test_constants_of_no_layer_are_refused(changes: dict[str, TensorSpec], message: str) -> None:
    constants = {**SPEC.constants(), **changes}
    with pytest.raises(ValueError, match=message):
        LayerSpec.of_constants(3, attributes(SPEC), constants)


def test_missing_constants_are_named() -> None:
    constants = {name: part for name, part in SPEC.constants().items() if name != "up_scale"}
    with pytest.raises(ValueError, match="the constants up_scale are missing"):
        LayerSpec.of_constants(3, attributes(SPEC), constants)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits is 5; allowed are 2, 3, 4, 8"),
        ({"bits": "3"}, "bits is '3'; it must be int"),
        ({"bits": True}, "bits is True"),
        ({"has_offset": 1}, "has_offset is 1; it must be bool"),
        ({"param_bits": 12}, "param_bits is 12; it must be one of 8, 16, 32"),
        ({"factor_bits": None}, "factor_bits is None"),
        ({"param_bits": [8]}, "param_bits"),
        ({"out_features": 0}, "out_features is 0; allowed are 1 to"),
        ({"in_features": 2**40}, "in_features"),
        ({"group": 0}, "group size 0 cannot cut"),
        ({"group": 24}, "group size 24 cannot cut"),
        ({"planes": 9}, "planes is 9; allowed are 1 to 8"),
        ({"rank": -1}, "rank is -1"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": "1"}, "scale is '1'"),
        ({"bias": "float64"}, "bias is 'float64'"),
        ({"kind": "conv"}, "kind is 'conv'"),
        ({"level_dtype": 3}, "level_dtype is 3"),
        ({"colour": 3}, "unknown fields .'colour'"),
    ],
)
def test_a_damaged_entry_of_a_file_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"layer 'a'.*{message}"):
        LayerSpec.from_json("a", {**SPEC.to_json(), **changes})


def test_an_entry_that_is_no_object_or_lacks_fields_is_named() -> None:
    with pytest.raises(ValueError, match="layer 'a' is list, not an object"):
        LayerSpec.from_json("a", [])
    with pytest.raises(ValueError, match="layer 'a' lacks fields: kind, method"):
        LayerSpec.from_json("a", {"bits": 3})


def test_keys_in_files_stay() -> None:
    assert replace(SPEC, params=Form.FLOAT16, factors=Form.FLOAT32, scale=2.0).to_json() == {
        "kind": "linear",
        "method": "rtn",
        "bits": 3,
        "out_features": 40,
        "in_features": 48,
        "group": 16,
        "planes": 2,
        "has_offset": True,
        "param_bits": 16,
        "bias": "float32",
        "rank": 4,
        "factor_bits": 32,
        "scale": 2.0,
    }


def test_a_layer_that_shares_tensors_stores_none() -> None:
    shared = replace(SPEC, shared_with="other")
    assert not shared.tensors()
    assert not shared.stored_bits()
    assert shared.bits_per_weight() == 0
