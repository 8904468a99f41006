"""Operators of several products: names, and the native library against each product alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from rankbook.plugins import library, merged
from tests.ops.cases import WIDE
from tests.ops.runners import built, ort_session, run_native
from tests.plugins.merged_ops import draw_several, merge, model_of, operator_of


def run(
    model: onnx.ModelProto, x: Any, activations: str = "fp32", *, native: bool = True, memory: str = "huge"
) -> list[Any]:
    path = str(library.library("ort")) if native else None
    return list(ort_session(model, path, activations=activations, memory=memory).run(None, {"x": x}))


def test_unpacking_gives_back_what_was_packed() -> None:
    ops = draw_several(replace(WIDE, rank=4), 3)
    operator, (attributes, data) = operator_of(ops), merge(ops)
    assert operator.name == "CodebookMatMulLowRank4Merged3"
    assert set(attributes) == {item.name for item in operator.attributes}
    for product, op in zip(merged.unpack(operator, attributes), ops, strict=True):
        assert product.attributes == op.attributes
        for name, value in product.constants.items():
            held = value.of(data) if isinstance(value, merged.Part) else value
            np.testing.assert_array_equal(held, op.inputs[name])


def test_parts_lie_on_cache_lines_without_overlap() -> None:
    ops = draw_several(replace(WIDE, rank=5, in_features=112, group=16), 3)
    attributes, data = merge(ops)
    products = merged.unpack(operator_of(ops), attributes)
    parts = [value for product in products for value in product.constants.values() if isinstance(value, merged.Part)]
    parts.sort(key=lambda part: part.start)
    assert len(parts) == 4 * len(ops)
    assert all(part.start % merged.ALIGNMENT == 0 for part in parts)
    assert all(one.end <= other.start for one, other in itertools.pairwise(parts))
    assert parts[-1].end == len(data)


@pytest.mark.parametrize("int8_activations", [False, True])
def test_the_reference_is_that_of_each_product(int8_activations: bool) -> None:
    ops = draw_several(replace(WIDE, bits=3, rank=4, int8_activations=int8_activations), 3)
    attributes, data = merge(ops)
    for got, op in zip(operator_of(ops).compute([ops[0].x, data], attributes), ops, strict=True):
        np.testing.assert_array_equal(got, op.expected())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("offset_0", None, "lacks the attributes offset_0"),
        ("codes_1", [64], r"attribute codes_1 is \[64\]; it must be a first byte and a shape"),
        ("codes_1", [0, -1], "attribute codes_1 is"),
        ("params_0", 3, "attribute params_0 is 3; it must be"),
        ("params_0", "text", "attribute params_0 is 'text'"),
    ],
)
def test_a_damaged_attribute_is_refused(name: str, value: Any, message: str) -> None:
    ops = draw_several(WIDE, 2)
    attributes, _ = merge(ops)
    changed = {key: item for key, item in attributes.items() if key != name}
    with pytest.raises(ValueError, match=message):
        merged.unpack(operator_of(ops), changed if value is None else {**changed, name: value})


@built
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_product_is_what_it_is_alone(bits: int, rank: int, tokens: int) -> None:
    """The same numbers to the last bit, exact or rounded, by the session or by the file, with one node or several."""
    case = replace(WIDE, bits=bits, rank=rank, tokens=(tokens,), bias=bool(rank), planes=1 + tokens % 2)
    for int8 in (False, True):
        ops = draw_several(replace(case, int8_activations=int8), 2 + tokens % 2)
        model = model_of(ops)
        for activations in ("fp32", "int8"):
            got = run(model, ops[0].inputs["x"], activations)
            want = [run_native(op, activations=activations) for op in ops]
            for mine, other in zip(got, want, strict=True):
                np.testing.assert_array_equal(mine, other)


@built
def test_half_activations() -> None:
    """fp16 in and out: every product has its own part of the staged results."""
    ops = draw_several(replace(WIDE, dtype="float16", tokens=(2, 3), rank=4), 3)
    got = run(model_of(ops), ops[0].inputs["x"], "int8")
    for mine, op in zip(got, ops, strict=True):
        np.testing.assert_array_equal(mine, run_native(op, activations="int8"))


@pytest.mark.parametrize("int8", [False, True])
def test_the_body_calls_the_bodies_of_the_products(int8: bool) -> None:
    """Stock ONNX Runtime; the tolerance is that of a float32 sum of 128 terms in another order."""
    ops = draw_several(replace(WIDE, bits=3, rank=4, int8_activations=int8), 2)
    got = run(model_of(ops, bodies=True), ops[0].inputs["x"], native=False)
    for mine, op in zip(got, ops, strict=True):
        want = op.expected()
        assert np.abs(mine - want).max() <= 1e-5 * np.abs(want).max()


@built
def test_products_that_do_not_belong_together_are_named() -> None:
    """Of another group size, where x is rounded per group."""
    ops = draw_several(WIDE, 2)
    ops[1] = WIDE.draw(group=32)
    with pytest.raises(Exception, match=r"CodebookMatMul4Merged2 'layer.0 layer.1'.*the same groups"):
        run(model_of(ops), ops[0].inputs["x"], "int8")
    got = run(model_of(ops), ops[0].inputs["x"])
    np.testing.assert_array_equal(got[1], run(ops[1].model(), ops[0].inputs["x"])[0])


@built
def test_a_wrong_constant_is_named_with_its_place() -> None:
    ops = draw_several(WIDE, 2)
    ops[1].inputs["codes"] = ops[1].inputs["codes"][:, :1]
    with pytest.raises(Exception, match=r"'layer.0 layer.1': input codes_1 has shape"):
        run(model_of(ops), ops[0].inputs["x"])


@built
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("codes_1", [0, 1 << 20, 1 << 20, 4, 32, 4], r"attribute codes_1 is \(0, 1048576, .* does not hold"),
        ("params_0", [1 << 40, 3, 2, 3, 32], "attribute params_0 is .* does not hold"),
        ("params_0", [-64, 3, 2, 3, 32], "attribute params_0 is .* does not hold"),
        ("codes_0", [64], "attribute codes_0 is .* does not hold"),
        ("levels_1", None, "the attribute levels_1 is missing"),
        ("codes_1", None, "the attribute codes_1 is missing"),
        ("levels_0", 3, "the attribute levels_0 is missing"),
    ],
)
def test_a_wrong_place_is_an_error_that_names_it(attribute: str, value: Any, message: str) -> None:
    model = model_of(draw_several(WIDE, 2))
    node = model.graph.node[0]
    kept = [item for item in node.attribute if item.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(attribute, value)])])
    with pytest.raises(Exception, match=r"'layer.0 layer.1': " + message):
        run(model, np.zeros((1, 128), np.float32))


@built
def test_without_copies() -> None:
    """The constants are read where ONNX Runtime has them."""
    ops = draw_several(replace(WIDE, rank=4, tokens=(1,)), 3)
    for activations in ("fp32", "int8"):
        want = run(model_of(ops), ops[0].inputs["x"], activations)
        got = run(model_of(ops), ops[0].inputs["x"], activations, memory="mapped")
        np.testing.assert_equal(got, want)
