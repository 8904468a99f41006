"""A small writer of ONNX functions: every call appends one node and returns the name of its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from rankbook.plugins import contract
from rankbook.plugins.contract import Attribute, Operator

OPSET = 23
"""Version of the default ONNX domain."""
VERSIONS = {"": OPSET, contract.DOMAIN: contract.VERSION}
"""Versions of the domains in the model and in the bodies; 1 of others."""
_KINDS = {
    "int": onnx.AttributeProto.INT,
    "float": onnx.AttributeProto.FLOAT,
    "ints": onnx.AttributeProto.INTS,
    "string": onnx.AttributeProto.STRING,
    "tensor": onnx.AttributeProto.TENSOR,
}
DEQUANTIZE = "RankbookDequantize"
"""Name of the function that turns INT8 into float32; every DequantizeLinear of a file is in it."""
_DEQUANTIZE_NODE = "ONNXTRT_ShapeSlice"
"""Name of the DequantizeLinear node.

The ONNX parser of TensorRT first gives a DequantizeLinear layer the bare name of its node and then a unique one. In
TensorRT-RTX 1.7 the first step fails if another layer has that name, as it has where a function is used twice. With
this name it works: the parser itself hands it out for a Slice or a Pad (so it is taken, and suffixes are added) and
renames that layer at once (so no layer has it). A function must therefore have one of them before its first
`FunctionWriter.dequantize`, and since ONNX Runtime refuses two nodes of one name in a function, the node has a function
of its own.
"""


def dequantize_function() -> onnx.FunctionProto:
    """Return the function `DEQUANTIZE`: INT8 codes to float32 values.

    The zero point says that codes are signed. Without it the optimizers of ONNX Runtime before 1.28 put an unsigned one
    in, and refuse the file (1.23, 1.24, 1.27) or take negative codes for 0 (1.25, 1.26; its issues 27845, 28491 and
    28716).
    """
    one = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array(1, np.float32)))
    zero = helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0, np.int8)))
    values = helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["values"], name=_DEQUANTIZE_NODE)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_function(contract.DOMAIN, DEQUANTIZE, ["codes"], ["values"], [one, zero, values], opsets)


def forwarded(item: Attribute, caller: str) -> onnx.AttributeProto:
    """Return an attribute of a node inside a function that is the attribute ``caller`` of the calling node."""
    return onnx.AttributeProto(name=item.name, type=_KINDS[item.kind], ref_attr_name=caller)


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_within(attribute.g.node)


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

    def dequantize(self, codes: str) -> str:
        """Return the INT8 tensor ``codes`` in float32, by way of `dequantize_function`."""
        return self.node(DEQUANTIZE, codes, domain=contract.DOMAIN)

    def floats(self, values: npt.ArrayLike) -> str:
        """Return a float32 constant."""
        return self._constant(np.asarray(values, np.float32))

    def ints(self, values: npt.ArrayLike) -> str:
        """Return an int64 constant."""
        return self._constant(np.asarray(values, np.int64))

    def attribute(self, name: str) -> str:
        """Return the integer attribute ``name`` of the calling node as an int64 tensor of shape (1,)."""
        return self.node("Reshape", self._attribute("value_int", onnx.AttributeProto.INT, name), self.ints([1]))

    def list_attribute(self, name: str) -> str:
        """Return the attribute ``name`` of the calling node, a list of integers, as an int64 tensor."""
        return self._attribute("value_ints", onnx.AttributeProto.INTS, name)

    def tensor_attribute(self, name: str) -> str:
        """Return the attribute ``name`` of the calling node, a tensor."""
        return self._attribute("value", onnx.AttributeProto.TENSOR, name)

    def size(self, value: str, axis: int) -> str:
        """Return the size of one axis as an int64 tensor of shape (1,)."""
        return self.node("Shape", value, start=axis, end=axis + 1)

    def call(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Iterable[onnx.AttributeProto],
    ) -> None:
        """Append a node of another domain; an empty output is one that nothing uses."""
        self._nodes.append(helper.make_node(op_type, inputs, outputs, domain=domain))
        self._nodes[-1].attribute.extend(attributes)

    def function(self, operator: Operator) -> onnx.FunctionProto:
        """Return the function of an operator."""
        outputs = [port.name for port in operator.outputs]
        return self.named(operator.name, operator.input_names(), outputs, [item.name for item in operator.attributes])

    def named(
        self, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str] = ()
    ) -> onnx.FunctionProto:
        """Return the function under any name."""
        domains = sorted({node.domain for node in nodes_within(self._nodes)} | {""})
        versions = [helper.make_opsetid(domain, VERSIONS.get(domain, 1)) for domain in domains]
        return helper.make_function(
            contract.DOMAIN, name, inputs, outputs, self._nodes, versions, attributes=attributes
        )

    def _attribute(self, field: str, kind: onnx.AttributeProto.AttributeType, name: str) -> str:
        output = f"t{len(self._nodes)}"
        node = helper.make_node("Constant", [], [output])
        node.attribute.append(onnx.AttributeProto(name=field, type=kind, ref_attr_name=name))
        self._nodes.append(node)
        return output

    def _constant(self, values: npt.NDArray[np.generic]) -> str:
        key = (values.tobytes(), values.dtype.name, values.shape)
        if key not in self._constants:
            self._constants[key] = self.node("Constant", value=numpy_helper.from_array(values))
        return self._constants[key]
