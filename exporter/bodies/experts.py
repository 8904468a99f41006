"""The bodies of products of experts: a loop over the chosen ones, each of which computes its rows.

Only the constants of chosen experts are read and decoded, one expert at a time: the file stays packed while it runs.
Every turn copies y, so that many rows of many experts take longer than their arithmetic.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from rankbook.exporter.bodies import product
from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins import contract
from rankbook.plugins.contract import Operator
from rankbook.plugins.experts import NUMBERS

PRODUCT = "Rankbook"
"""Begins the name of the function of one product in the loop: kernels of the operator itself need fixed constants."""
_SIZES = ("in_features", "out_features")


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function that computes the products of experts.

    Raises:
        ValueError: It is another operator.
    """
    if operator.one_of is None:
        raise ValueError(f"{operator.name} has no experts")
    writer = FunctionWriter()
    node, ints = writer.node, writer.ints
    sizes = [writer.attribute(name) for name in _SIZES]
    chosen = node("Unique", NUMBERS, sorted=1)
    shape = node("Concat", node("Shape", "x", start=0, end=1), sizes[1], axis=0)
    empty = node("Expand", node("CastLike", writer.floats(0), "x"), shape)
    turn = _turn(operator.one_of, chosen, sizes)
    node("Loop", node("Squeeze", node("Shape", chosen), ints([0])), "", empty, output="y", body=turn)
    return writer.function(operator)


def one(member: Operator) -> onnx.FunctionProto:
    """Return the function of the product of one expert; its sizes are inputs: a loop cannot pass attributes on."""
    writer = FunctionWriter()
    product.write(writer, member, *_SIZES)
    return writer.named(f"{PRODUCT}{member.name}", [*member.input_names(), *_SIZES], ["y"])


class Turn:
    """Writes the body of a loop over experts.

    ``turn``, ``on_before`` and ``y_before`` go in, ``on_after`` and ``y_after`` come out.
    """

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []

    def node(self, op_type: str, *inputs: str, output: str, **attributes: Any) -> str:
        """Add a node; return the name of what it gives."""
        self._nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def graph(self) -> onnx.GraphProto:
        """Return the body."""
        inputs = [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on_before", TensorProto.BOOL, []),
            onnx.ValueInfoProto(name="y_before"),
        ]
        on = helper.make_tensor_value_info("on_after", TensorProto.BOOL, [])
        return helper.make_graph(self._nodes, "turn", inputs, [on, onnx.ValueInfoProto(name="y_after")])


def _turn(member: Operator, chosen: str, sizes: list[str]) -> onnx.GraphProto:
    """Return the body of the loop: the rows of one expert, put into y."""
    turn = Turn()
    node = turn.node
    expert = node("Gather", chosen, "turn", output="expert", axis=0)
    where = node("NonZero", node("Equal", NUMBERS, expert, output="is_its"), output="where")
    rows = node("Transpose", where, output="rows", perm=[1, 0])
    x = node("GatherND", "x", rows, output="its_x")
    constants = [node("Gather", name, expert, output=f"its_{name}", axis=0) for name in member.constants()]
    part = node(f"{PRODUCT}{member.name}", x, *constants, *sizes, output="its_y", domain=contract.DOMAIN)
    node("ScatterND", "y_before", rows, part, output="y_after")
    node("Identity", "on_before", output="on_after")
    return turn.graph()
