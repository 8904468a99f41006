"""Polygraphy's comparison of two Python functions, such as a torch model and an ONNX Runtime session."""

from __future__ import annotations

import math
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


def compare(first: Any, second: Any, feeds: Feeds, tolerance: float) -> list[Agreement]:
    """Run two runners on the same inputs and compare their outputs, see `judge`."""
    return judge(run([first, second], feeds), tolerance)


def run(runners: Sequence[Any], feeds: Feeds) -> Any:
    """Run runners, whose names differ, on the same inputs; return polygraphy's ``RunResults``, which it can save."""
    from polygraphy.comparator import Comparator
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return Comparator.run(list(runners), data_loader=[OrderedDict(feeds)])


def judge(results: Any, tolerance: float, pair: tuple[int, int] = (0, 1)) -> list[Agreement]:
    """Compare the outputs of two runners, which must have the same names.

    Args:
        results: What `run` returned.
        tolerance: Largest difference allowed, relative to the largest value of the first runner.
        pair: Places of the runner that is right and of the one in question.

    Returns:
        One agreement for each output, in the order of the first runner.
    """
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    # Verdicts are reported elsewhere; polygraphy's own lines would go to stdout.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        (expected,) = list(results.values())[pair[0]]
        scales = {name: _largest(np.asarray(value)) for name, value in expected.items()}
        limits = {name: tolerance * scale for name, scale in scales.items()} | {"": tolerance}
        function = SimpleCompareFunc(check_error_stat="max", atol=limits, rtol=0.0)
        verdicts = Comparator.compare_accuracy(results, compare_func=function, comparisons=[pair])
    ((outcomes,),) = verdicts[0].values()
    return [_agreement(name, scale, tolerance, outcomes.get(name)) for name, scale in scales.items()]


def _largest(values: Array) -> float:
    return max(float(np.abs(values).max(initial=0)), float(np.finfo(np.float32).tiny))


def _agreement(name: str, scale: float, tolerance: float, outcome: Any) -> Agreement:
    """An output that is missing, of another shape or not finite has no statistics: its error is infinite."""
    known = hasattr(outcome, "max_absdiff") and np.isfinite(outcome.max_absdiff)
    largest, mean = (outcome.max_absdiff / scale, outcome.mean_absdiff / scale) if known else (math.inf, math.inf)
    return Agreement(name, largest, mean, scale, tolerance, known and bool(outcome))
