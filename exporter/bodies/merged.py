"""The bodies of operators of several products: each is a call of the function of one product."""

from __future__ import annotations

import onnx
from onnx import helper

from rankbook.exporter.functions import FunctionWriter, forwarded
from rankbook.plugins import contract, merged
from rankbook.plugins.contract import Operator

_MOST_AXES = 5
"""Of a constant."""


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function that computes all products.

    Raises:
        ValueError: It is an operator of one product.
    """
    member, writer = operator.member, FunctionWriter()
    if member is None:
        raise ValueError(f"{operator.name} has no products")
    for i, output in enumerate(operator.outputs):
        inputs = [
            _part(writer, f"{name}_{i}") if name in merged.PARTS else writer.tensor_attribute(f"{name}_{i}")
            for name in member.constants()
        ]
        attributes = [
            helper.make_attribute(item.name, item.value)
            if item.kind == "string"
            else forwarded(item, f"{item.name}_{i}")
            for item in member.attributes
        ]
        writer.call(contract.DOMAIN, member.name, [operator.inputs[0].name, *inputs], [output.name], attributes)
    return writer.function(operator)


def _part(writer: FunctionWriter, attribute: str) -> str:
    """Cut a constant out of the tensor that holds them; the attribute is its first byte and its shape."""
    node, ints = writer.node, writer.ints
    place = writer.list_attribute(attribute)
    start = node("Slice", place, ints([0]), ints([1]))
    shape = node("Slice", place, ints([1]), ints([_MOST_AXES + 1]))
    end = node("Add", start, node("ReduceProd", shape, keepdims=1))
    return node("Reshape", node("Slice", merged.DATA, start, end), shape)
