"""What a method is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.record.quantized_linear import QuantizedLinear

_SOURCE = re.compile(r"\s*\(([^()]*arXiv[^()]*)\)")


@dataclass(frozen=True)
class Method:
    """A quantization method: one module in this package that ends in ``METHOD = Method(...)``.

    Attributes:
        name: What ``--method`` takes.
        config_type: Frozen dataclass of its options, fields made with `rankbook.calibration.option.option`.
        quantize: ``quantize(problem, config)`` solves one layer in closed form.
        refine: ``refine(problem, records, config)`` improves the records of a whole block by its output, or None
            where the method has no such stage. It is given what ``quantize`` returned (with error branches, if any).
        trains: Whether ``refine`` does anything with this config; without, no stream of targets is computed.
        weighs_inputs: Whether ``quantize`` looks at the statistics of a layer's inputs with this config; where nothing
            does, no text is read or sampled.
        scale_inputs: Input scaling that belongs to the method (see `rankbook.calibration.driver.scaling`).
        feedback: Whether codes are chosen with error feedback, so that the errors of a layer are not independent.
        rows: ``rows(sample, config)`` fits to some rows of a large matrix what all of them share, and returns what
            quantizes any rows with it; None where error feedback on a fixed grid is as good for embeddings.
        predict: ``predict(weight, energy, group, bits, planes)`` decodes a quick fit of rows (N, K), for choosing the
            number of planes, which is the option ``rank`` then; None where a record has no choice of planes.
    """

    name: str
    config_type: type
    quantize: Callable[[LayerProblem, Any], QuantizedLinear]
    refine: Callable[[BlockProblem, Mapping[str, QuantizedLinear], Any], dict[str, QuantizedLinear]] | None = None
    trains: Callable[[Any], bool] = lambda _: True
    weighs_inputs: Callable[[Any], bool] = lambda _: True
    scale_inputs: str = "none"
    feedback: bool = False
    rows: Callable[[LayerProblem, Any], Callable[[LayerProblem], QuantizedLinear]] | None = None
    predict: Callable[[Tensor, Tensor, int, int, int], Tensor] | None = None

    @property
    def summary(self) -> str:
        """What it does, in one line: the first line of its module, without name and source."""
        name, _, text = _SOURCE.sub("", self._first_line()).partition(":")
        return (text or name).strip().rstrip(".")

    @property
    def source(self) -> str:
        """The paper it comes from, as the first line of its module names it in brackets; empty without one."""
        found = _SOURCE.search(self._first_line())
        return found.group(1) if found else ""

    def _first_line(self) -> str:
        return (sys.modules[self.config_type.__module__].__doc__ or "").strip().partition("\n")[0]
