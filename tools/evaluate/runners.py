"""Polygraphy's comparison of two Python functions, such as a torch model and an ONNX Runtime session."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Agreement:
    """How close two runners are in one output.

    Attributes:
        name: The output.
        error: Largest difference, relative to the largest value of the first runner.
        mean_error: Mean difference, relative to the same.
        scale: Largest value of the first runner.
        tolerance: Largest error that passes.
        passed: Polygraphy's verdict.
    """

    name: str
    error: float
    mean_error: float
    scale: float
    tolerance: float
    passed: bool


def function_runner(name: str, inputs: Feeds, infer: Callable[[Feeds], Mapping[str, Array]]) -> Any:
    """Return a polygraphy runner that calls ``infer``.

    Args:
        name: Shown in reports.
        inputs: Examples of the inputs; their names and types matter.
        infer: Maps inputs by name to outputs by name.
    """
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata
    from polygraphy.datatype import DataType

    class FunctionRunner(BaseRunner):  # type: ignore[misc]
        """Runs a Python function."""

        def get_input_metadata_impl(self) -> Any:
            """Names, types and ranks of the inputs."""
            metadata = TensorMetadata()
            for key, value in inputs.items():
                metadata.add(key, dtype=DataType.from_dtype(value.dtype, "numpy"), shape=(None,) * value.ndim)
            return metadata

        def infer_impl(self, feed_dict: Feeds) -> OrderedDict[str, Array]:
            """Call the function."""
            start = time.perf_counter()
            # polygraphy refuses views, such as the last position of all logits.
            outputs = OrderedDict((key, np.ascontiguousarray(value)) for key, value in infer(feed_dict).items())
            self.inference_time = time.perf_counter() - start
            return outputs

    return FunctionRunner(name=name)


def compare(first: Any, second: Any, feeds: Sequence[Feeds], tolerance: float) -> list[Agreement]:
    """Run two runners on the same inputs and compare their outputs, which must have the same names.

    Args:
        first: The runner that is right.
        second: The runner in question.
        feeds: Inputs of each iteration.
        tolerance: Largest difference allowed, relative to the largest value of the first runner.

    Returns:
        One agreement for each output, in the order of the first runner; with several iterations, the worst one.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    # Verdicts are reported elsewhere; polygraphy's own lines would go to stdout.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run([first, second], data_loader=[OrderedDict(feed) for feed in feeds])
        (_, expected), (_, actual) = results.items()
        scales = _scales(expected)
        limits = {name: tolerance * scale for name, scale in scales.items()} | {"": tolerance}
        function = SimpleCompareFunc(check_error_stat="max", atol=limits, rtol=0.0)
        verdicts = Comparator.compare_accuracy(results, compare_func=function)
    pair = next(iter(verdicts[0].values()))
    agreements = []
    for name, scale in scales.items():
        outcomes = [iteration.get(name) for iteration in pair]
        agreements.append(_agreement(name, scale, tolerance, outcomes))
    del actual
    return agreements


def _scales(iterations: Any) -> dict[str, float]:
    scales: dict[str, float] = {}
    for iteration in iterations:
        for name, value in iteration.items():
            array = np.asarray(value)
            largest = float(np.abs(array).max()) if array.size else 0.0
            scales[name] = max(scales.get(name, 0.0), largest, float(np.finfo(np.float32).tiny))
    return scales


def _agreement(name: str, scale: float, tolerance: float, outcomes: Sequence[Any]) -> Agreement:
    """An output that is missing, of another shape or not finite has no statistics: its error is infinite."""
    largest = mean = 0.0
    passed = True
    for outcome in outcomes:
        known = hasattr(outcome, "max_absdiff") and np.isfinite(outcome.max_absdiff)
        largest = max(largest, outcome.max_absdiff / scale if known else float("inf"))
        mean = max(mean, outcome.mean_absdiff / scale if known else float("inf"))
        passed = passed and known and bool(outcome)
    return Agreement(name, largest, mean, scale, tolerance, passed)
