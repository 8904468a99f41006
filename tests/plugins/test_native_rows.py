"""Operators on rows compute what their numpy reference computes, in the native library and as their bodies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rankbook.plugins import library, rows
from rankbook.plugins.operators import OPERATORS
from rankbook.plugins.rows import ADD_NORM, SWIGLU
from tests.ops.runners import built, run_in_process
from tests.plugins.row_models import EPSILON, Floats, model_of

NAMES = [operator.name for operator in rows.OPERATORS]
SHAPES = [(1, 1, 576), (2, 3, 40), (3, 7), (700, 128)]
"""One token; rows that end inside a vector; enough numbers for several tasks."""
RELATIVE = 2e-6
"""fp32 on both sides: one sum of up to 576 squares in another order, an exponential within 2.2e-7 of the true one;
relative to the largest output."""


def run(name: str, scale: Floats, feeds: dict[str, Floats], *, native: bool = True) -> list[Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if native:
        options.register_custom_ops_library(str(library.library("ort")))
    made = ort.InferenceSession(model_of(name, scale).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(made.run(None, feeds))


def draw(name: str, shape: tuple[int, ...]) -> tuple[Floats, dict[str, Floats]]:
    rng = np.random.default_rng(0)
    names = [key for key in OPERATORS[name].input_names() if key != "scale"]
    feeds = {key: (rng.standard_normal(shape) * 4).astype(np.float32) for key in names}
    return rng.standard_normal(shape[-1]).astype(np.float32), feeds


def expected(name: str, scale: Floats, feeds: dict[str, Floats]) -> tuple[Any, ...]:
    """Return what the numpy reference computes."""
    operator = OPERATORS[name]
    inputs = [feeds.get(key, scale) for key in operator.input_names()]
    return operator.compute(inputs, {item.name: EPSILON for item in operator.attributes})


@pytest.mark.parametrize("name", NAMES)
def test_the_body_computes_what_the_reference_computes(name: str) -> None:
    """In stock ONNX Runtime."""
    for shape in SHAPES:
        scale, feeds = draw(name, shape)
        for got, want in zip(run(name, scale, feeds, native=False), expected(name, scale, feeds), strict=True):
            assert got.shape == want.shape == shape
            assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


def compare() -> None:
    """Compare every operator and shape with the reference."""
    for name in NAMES:
        for shape in SHAPES:
            scale, feeds = draw(name, shape)
            pairs = zip(run(name, scale, feeds), expected(name, scale, feeds), strict=True)
            for got, want in pairs:
                assert got.shape == want.shape == shape
                assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


@built
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_computes_what_the_reference_computes(isa: str) -> None:
    run_in_process(f"{__name__}:compare", isa)


@built
def test_numbers_that_are_not_finite() -> None:
    """A gate of either infinity and NaN give what body and reference give."""
    gate = np.array([np.inf, -np.inf, np.nan, 1e30, -1e30, 0.0], np.float32)
    feeds = {"gate": gate, "up": np.full(6, 2.0, np.float32)}
    scale = np.ones(6, np.float32)
    with np.errstate(invalid="ignore"):
        got, want = (run(SWIGLU.name, scale, feeds, native=native)[0] for native in (True, False))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-30)


@built
@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        (ADD_NORM.name, "b", r"AddRMSNormalization 'layer': a has shape \(2, 3, 40\) and b \(2, 1, 40\)"),
        (SWIGLU.name, "up", r"SwiGLU 'layer': gate has shape \(2, 3, 40\) and up \(2, 1, 40\)"),
    ],
)
def test_shapes_that_differ_are_named(name: str, key: str, message: str) -> None:
    scale, feeds = draw(name, (2, 3, 40))
    feeds[key] = feeds[key][:, :1].copy()
    with pytest.raises(Exception, match=message):
        run(name, scale, feeds)


@built
def test_a_scale_of_another_size_is_named() -> None:
    scale, feeds = draw(ADD_NORM.name, (3, 40))
    with pytest.raises(Exception, match=r"both must be \(..., 39\)"):
        run(ADD_NORM.name, scale[:39], feeds)
