"""A small writer of ONNX functions: every call appends one node and returns the name of its output."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

OPSET = 23
"""Version of the default ONNX domain in the model and in the bodies of the operators."""


class FunctionWriter:
    """Collects the nodes of one function."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[tuple[bytes, str, tuple[int, ...]], str] = {}

    def node(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Append a node of the default domain; an empty input is one left out."""
        output = output or f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def floats(self, values: npt.ArrayLike) -> str:
        """Return a float32 constant."""
        return self._constant(np.asarray(values, np.float32))

    def ints(self, values: npt.ArrayLike) -> str:
        """Return an int64 constant."""
        return self._constant(np.asarray(values, np.int64))

    def attribute(self, name: str) -> str:
        """Return the integer attribute ``name`` of the calling node as an int64 tensor of shape (1,)."""
        output = f"t{len(self._nodes)}"
        node = helper.make_node("Constant", [], [output])
        node.attribute.append(onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, ref_attr_name=name))
        self._nodes.append(node)
        return self.node("Reshape", output, self.ints([1]))

    def size(self, value: str, axis: int) -> str:
        """Return the size of one axis as an int64 tensor of shape (1,)."""
        return self.node("Shape", value, start=axis, end=axis + 1)

    def function(
        self, domain: str, name: str, inputs: list[str], outputs: list[str], attributes: list[str]
    ) -> onnx.FunctionProto:
        """Return the function."""
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_function(domain, name, inputs, outputs, self._nodes, opset, attributes=attributes)

    def _constant(self, values: npt.NDArray[np.generic]) -> str:
        key = (values.tobytes(), values.dtype.name, values.shape)
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=numpy_helper.from_array(values))
        return self._constants[key]
