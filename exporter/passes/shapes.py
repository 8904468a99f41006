"""Gives every value of a graph a type and a shape."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


class InferShapes(ir.passes.InPlacePass):
    """Runs the shape inference of ONNX and checks that nothing is left unknown.

    Initializers of more than a kilobyte take no part, so the size of the model does not matter.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: A value has no type or no rank; the message names it and its node.
        """
        ShapeInferencePass(check_type=True, strict_mode=True, data_prop=True)(model)
        for node in model.graph:
            for output in node.outputs:
                if output.name and (output.shape is None or output.dtype is None):
                    raise ValueError(f"{node.op_type} node {node.name!r}: output {output.name!r} has no type or shape")
        return ir.passes.PassResult(model, modified=True)
