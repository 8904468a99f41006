"""Two functions are compared output by output, relative to the largest value of the first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from rankbook.tools.evaluate.runners import Agreement, compare, function_runner

INPUTS = {"x": np.ones((1, 4), np.float32)}


def runner(outputs: Mapping[str, Any]) -> Any:
    arrays = {name: np.asarray(value, np.float32) for name, value in outputs.items()}
    return function_runner("a function", INPUTS, lambda _: arrays)


def agreements(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Agreement]:
    return compare(runner(first), runner(second), INPUTS, 0.1)


def test_errors_are_relative_to_the_largest_value() -> None:
    a, b = agreements({"a": [[0.0, 10.0]], "b": [[1.0, 2.0]]}, {"a": [[0.5, 10.0]], "b": [[1.0, 1.5]]})
    assert (a.name, a.scale, a.passed) == ("a", 10.0, True)
    assert [a.error, a.mean_error, b.error] == pytest.approx([0.05, 0.025, 0.25])
    assert not b.passed


@pytest.mark.parametrize("other", [{"a": [[np.nan, 1.0]]}, {"a": [[1.0, 1.0, 1.0]]}])
def test_what_cannot_be_compared_has_an_infinite_error(other: dict[str, Any]) -> None:
    (found,) = agreements({"a": [[1.0, 1.0]]}, other)
    assert found.error == math.inf
    assert not found.passed


def test_zeros_have_a_scale() -> None:
    (found,) = agreements({"a": [[0.0, 0.0]]}, {"a": [[0.0, 0.0]]})
    assert (found.error, found.passed) == (0.0, True)
