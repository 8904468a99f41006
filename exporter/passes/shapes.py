"""Gives every value of a graph a type and a shape."""

from __future__ import annotations

import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


class InferShapes(ir.passes.InPlacePass):
    """Runs the shape inference of ONNX and checks that nothing is left unknown.

    Initializers of more than a kilobyte take no part, so the size of the model does not matter.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: Shapes contradict each other, or a value has no type or no rank; the message names its node.
        """
        logger, failures = logging.getLogger(ShapeInferencePass.__module__), _Failures()
        logger.addHandler(failures)
        propagate, logger.propagate = logger.propagate, False
        try:
            ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
        finally:
            logger.removeHandler(failures)
            logger.propagate = propagate
        if failures.found:
            raise ValueError(
                f"the shapes of its graph contradict each other: {' '.join(failures.found[0].split()):.300}"
            )
        for node in model.graph:
            for output in node.outputs:
                if output.name and (output.shape is None or output.dtype is None):
                    raise ValueError(f"{node.op_type} node {node.name!r}: output {output.name!r} has no type or shape")
        return ir.passes.PassResult(model, modified=True)


class _Failures(logging.Handler):
    """Keeps what onnx_ir logs in place of an exception."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception of a record."""
        self.found.append(str(record.exc_info[1]) if record.exc_info else record.getMessage())
