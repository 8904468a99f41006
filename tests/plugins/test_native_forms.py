"""Constants that are each allowed but lie together: the library refuses them with a sentence, and reads none of them.

What is a layer, says `rankbook.plugins.forms`; the product of its shapes and types across the constants is what is
tried here, alone and merged, exact and rounded, with copies and without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from rankbook.plugins import attention, int8, library
from rankbook.plugins.rows import ADD_NORM, SWIGLU
from tests.ops.cases import Case, Op, relative_error
from tests.ops.runners import built, ort_session
from tests.plugins import attention_models, row_models
from tests.plugins.form_cases import CASE, COMBINATIONS, Combination, poisoned, typed, with_groups, with_planes
from tests.plugins.merged_ops import model_of

pytestmark = built

MODES = [("fp32", "huge"), ("fp32", "mapped"), ("int8", "huge"), ("int8", "mapped")]
RELATIVE = 1e-5
"""Sums of a hundred terms in fp32, against sums in float64."""


def create(model: Any, **entries: Any) -> Any:
    """Return a session with the library."""
    return ort_session(model, str(library.library("ort")), **entries)


def run(model: Any, x: Any, activations: str = "fp32", *, memory: str = "huge") -> list[Any]:
    """Run a model of one node."""
    return list(create(model, activations=activations, memory=memory).run(None, {"x": x}))


def models(op: Op) -> list[Any]:
    """The operator alone, and as the second product of a merged one."""
    return [op.model(), model_of([CASE.draw(), op])]


def check_refused(op: Op, message: str, activations: str = "fp32", memory: str = "huge") -> None:
    """Both forms of the node are refused when the session is created, with the node's name."""
    for model in models(op):
        with pytest.raises(Exception, match=rf"(?s)CodebookMatMulLowRank4\S* 'layer.*{message}"):
            run(model, op.x, activations, memory=memory)


def test_the_product_has_the_legal_forms_and_many_lies() -> None:
    assert sum(one.legal for one in COMBINATIONS) == 6
    assert len(COMBINATIONS) == 2 * 3 * 2 + 2 * 3 * 2 * 3


@pytest.mark.parametrize("combination", [one for one in COMBINATIONS if one.legal], ids=str)
def test_a_legal_form_is_what_the_reference_computes(combination: Combination) -> None:
    op = combination.op()
    for activations, memory in MODES:
        for model in models(op):
            got = run(model, op.x, activations, memory=memory)[-1]
            if activations == "int8":
                np.testing.assert_array_equal(got, int8.codebook_matmul(op.inputs, op.attributes))
            else:
                assert relative_error(got, op.expected()) < RELATIVE


@pytest.mark.parametrize("combination", [one for one in COMBINATIONS if not one.legal], ids=str)
def test_constants_that_do_not_belong_together_are_refused(combination: Combination) -> None:
    """The sentence names a constant of the part, what it is and what it may be beside the others."""
    names = "|".join(combination.parts)
    for activations, memory in MODES[::3]:
        check_refused(combination.op(), rf"input ({names})\S* (has shape|is) .*it must be .*", activations, memory)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("case", [{"in_features": 1, "group": 1}, {"out_features": 1}, {"rank": 1}], ids=str)
def test_sizes_of_one_are_no_placeholders(case: dict[str, int], bits: int) -> None:
    """(1, 1) may be a whole factor; the forms are told apart by all constants of the part."""
    sizes: dict[str, Any] = {"out_features": 1, "in_features": 16, "group": 16, "rank": 1, **case}
    op = CASE.draw(**sizes, param_bits=bits, factor_bits=bits)
    assert relative_error(run(op.model(), op.x)[0], op.expected()) < RELATIVE


@pytest.mark.parametrize("dtype", ["float64", "int32", "float16", "float32", "int8"])
@pytest.mark.parametrize("name", ["codes", "levels", "params", "step", "base", "bias", "down", "down_scale", "up"])
def test_types_are_those_of_the_table(name: str, dtype: str) -> None:
    op = typed(name, dtype)
    cast = (name, dtype) == ("levels", "float32")  # as ONNX Runtime may do it
    if cast or op.inputs[name].dtype == CASE.draw().inputs[name].dtype:
        assert relative_error(run(op.model(), op.x)[0], op.expected()) < RELATIVE
        return
    with pytest.raises(Exception, match=rf"'layer'.*input {name} is .*; it must be"):
        run(op.model(), op.x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *((name, 8) for name in ("levels", "step", "base", "bias", "down_scale", "up_scale")),
        *((name, bits) for name in ("step", "down_scale", "up_scale") for bits in (16, 32)),
    ],
)
def test_elements_that_are_not_finite_are_refused(name: str, bits: int, value: float) -> None:
    check_refused(poisoned(name, bits, value), rf"input {name}\S* holds NaN or infinity")


@pytest.mark.parametrize(("name", "value"), [("params", 2), ("base", 1), ("down", 0), ("up", -1), ("bias", 1)])
def test_placeholders_hold_what_changes_nothing(name: str, value: int) -> None:
    op = CASE.draw(param_bits=16, factor_bits=32, bias=False)
    op.inputs[name] = np.full_like(op.inputs[name], value)
    check_refused(op, rf"input {name}\S* is a placeholder and must hold [01]; it holds {value}")


@pytest.mark.parametrize(("in_features", "group"), [(48, 8), (48, 24), (544, 272), (100, 50)])
def test_groups_that_no_kernel_has_are_refused(in_features: int, group: int) -> None:
    op = with_groups(Case(in_features=in_features, group=in_features).draw(), in_features // group)
    message = rf"{in_features // group} groups cannot cut rows of {in_features} inputs: .* multiple of 16 .* up to 256"
    with pytest.raises(Exception, match=message):
        run(op.model(), op.x)


def test_planes_are_bounded_by_the_width() -> None:
    op = with_planes(Case(bits=2).draw(), 5, offset=0)
    with pytest.raises(Exception, match=r"there are 5 planes of levels; this runtime takes 1 to 4"):
        run(op.model(), op.x)
    op = with_planes(Case().draw(), 1, offset=1)
    with pytest.raises(Exception, match=r"levels has 1 rows and offset is 1: there are 0 planes"):
        run(op.model(), op.x)


def test_sizes_that_do_not_fit_32_bits_are_refused() -> None:
    op = Case().draw()
    op.attributes["out_features"] = 2**31
    with pytest.raises(Exception, match=r"out_features is 2147483648; it must be 1 to 2147483647"):
        run(op.model(), op.x)


def leave_out(model: Any, kind: str, index: int) -> Any:
    """Return the model whose node names no value for an input or output."""
    node = model.graph.node[0]
    names = getattr(node, kind)
    values = getattr(model.graph, kind)
    for value in [value for value in values if value.name == names[index]]:
        values.remove(value)
    names[index] = ""
    del model.functions[:]
    return model


@pytest.mark.parametrize("index", range(1, 11))
def test_a_product_without_an_input_is_refused(index: int) -> None:
    """ONNX Runtime does it itself: their number and types are open, but each must have one."""
    op = CASE.draw()
    with pytest.raises(Exception, match=r"Node \(layer\)|'layer': it has 10 inputs"):
        run(leave_out(op.model(), "input", index), op.x)


@pytest.mark.parametrize("name", [port.name for port in attention.OPERATOR.inputs if port.given_if])
def test_attention_without_an_input_of_the_rotary_embedding_is_refused(name: str) -> None:
    """It crashed at the first run."""
    node = attention_models.Node(body=False)
    index = attention.OPERATOR.input_names().index(name)
    with pytest.raises(Exception, match=rf"GroupQueryAttention 'att'.*(input number {index} is left out|9 inputs)"):
        create(leave_out(node.model(), "input", index))


@pytest.mark.parametrize("kind", ["input", "output"])
def test_other_nodes_without_a_value_are_refused(kind: str) -> None:
    """Whatever ONNX Runtime itself lets pass."""
    attention = attention_models.Node(body=False).model()
    rows = [row_models.model_of(op.name, np.ones(8, np.float32)) for op in (ADD_NORM, SWIGLU)]
    merged = model_of([CASE.draw(), CASE.draw()])
    for model in (attention, *rows, merged):
        for index in range(len(getattr(model.graph.node[0], kind))):
            changed = type(model).FromString(model.SerializeToString())
            if kind == "output" and len(changed.graph.output) == 1:
                continue
            with pytest.raises(Exception, match=r"left out|inputs|[Rr]equired|missing|optional|Node|Invalid"):
                create(leave_out(changed, kind, index))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.zeros(0, np.float32), r"scale has shape \(0\); it must be .* at least one element"),
        (np.ones((2, 4), np.float32), r"scale has shape \(2, 4\)"),
        (np.array([1, np.nan], np.float32), "scale holds NaN or infinity"),
    ],
)
def test_a_norm_without_elements_or_with_damaged_ones_is_refused(scale: Any, message: str) -> None:
    """Of a scale of no elements, a row was divided by its size: the process ended."""
    with pytest.raises(Exception, match=rf"AddRMSNormalization 'layer': input {message}"):
        create(row_models.model_of(ADD_NORM.name, scale))


@pytest.mark.parametrize("epsilon", [-1.0, np.nan, np.inf])
def test_an_epsilon_that_is_no_small_number_is_refused(epsilon: float) -> None:
    model = row_models.model_of(ADD_NORM.name, np.ones(8, np.float32))
    attributes = model.graph.node[0].attribute
    del attributes[:]
    attributes.append(helper.make_attribute("epsilon", epsilon))
    with pytest.raises(Exception, match=r"'layer': attribute epsilon is .*; it must be 0 or a positive number"):
        create(model)


def test_what_was_read_beyond_a_factor_is_refused() -> None:
    """A factor of one element beside scales of another rank: heap memory came back in y."""
    op = CASE.draw()
    op.inputs["up"] = np.ones((1, 1), np.int8)
    message = r"input up\S* has shape \(1, 1\); it must be \(40, 3\) beside down\S* of shape \(3, 96\)"
    for activations, memory in MODES:
        check_refused(op, message, activations, memory)
