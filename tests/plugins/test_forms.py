"""Forms of stored parts: shapes with letters are matched, and a layer has the form that all of its parts have."""

from __future__ import annotations

import numpy as np
import pytest

from rankbook.plugins.forms import CONSTANTS, FACTORS, PARAMS, Form, TensorSpec, match, match_shape, spell


def test_letters_take_the_sizes_that_they_meet() -> None:
    assert match_shape(("N", 4), (8, 4), {}) == {"N": 8}
    assert match_shape(("N", "N"), (8, 9), {}) is None
    assert match_shape(("N",), (8,), {"N": 9}) is None
    assert match_shape(("...", "K"), (2, 3, 8), {}) == {"K": 8}
    assert match_shape(("N * H", "K"), (None, 8), {}) == {"K": 8}
    assert match_shape(("N",), (1, 8), {}) is None


@pytest.mark.parametrize("form", list(Form))
def test_a_form_is_known_by_all_of_its_parts(form: Form) -> None:
    sizes = {"NP": 2, "G": 3, "Q": 2}
    given = {name: part.sized(sizes) for name, part in PARAMS[form].items()}
    index, found = match(list(PARAMS.values()), given, {"NP": 2})
    assert (tuple(PARAMS)[index], found) == (form, sizes)


def test_a_mixture_of_forms_is_refused_with_what_is_allowed() -> None:
    sizes = {"NP": 2, "G": 3, "Q": 2}
    given = {name: part.sized(sizes) for name, part in PARAMS[Form.INT8].items()}
    given["step"] = PARAMS[Form.FLOAT16]["step"].sized(sizes)
    with pytest.raises(ValueError, match=r"params int8 \(2, 3, 2, 32\), step float16 .*allowed are params int8"):
        match(list(PARAMS.values()), given, {"NP": 2})
    del given["base"]
    with pytest.raises(ValueError, match="the constants base are missing"):
        match(list(PARAMS.values()), given, {})


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (np.ones((2, 3), np.float16), r"x is float16 \(2, 3\); the description of the layer asks for float32"),
        (np.array([[1, 2, np.nan]], np.float32), "x holds NaN or infinity"),
    ],
)
def test_a_tensor_that_does_not_fit_is_said(tensor: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TensorSpec((1, 3), "float32").check("x", tensor)


def test_a_placeholder_holds_what_changes_nothing() -> None:
    spec = TensorSpec((1, 1), "int8", 1)
    spec.check("down", np.ones((1, 1), np.int8))
    with pytest.raises(ValueError, match="must hold 1; it holds 2"):
        spec.check("down", np.full((1, 1), 2, np.int8))


def test_bits_are_those_of_the_elements() -> None:
    assert TensorSpec((2, 3), "float16").bits == 96
    assert TensorSpec((4,), "uint8").bits == 32
    assert spell(TensorSpec((2, 3), "float16")) == "float16 (2, 3)"
    assert {name for form in FACTORS.values() for name in form} <= set(CONSTANTS)
