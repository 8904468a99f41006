"""Products of experts for engines without a plugin: a loop over the chosen experts that TensorRT can build.

It differs from `rankbook.exporter.bodies.experts` in two ways. TensorRT has neither Unique nor sizes that depend on
values within a loop: the chosen experts come first in an order by whether a row was sent to them, and each is
multiplied with all rows, of which its own are kept. And TensorRT reads no INT8 constant but through DequantizeLinear,
which would decode all experts in every call: constants of bytes are INT32 words here, the same bytes, taken apart
behind the Gather of one expert.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

from rankbook.exporter.bodies import experts, product
from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins import contract
from rankbook.plugins.contract import Operator
from rankbook.plugins.experts import NUMBERS

_SIZES = ("in_features", "out_features")
FLAT: dict[str, tuple[int | str, int | str]] = {"down": (-1, "in_features"), "up": ("out_features", -1)}
"""Constants whose words are in one row for each expert, and their shapes."""


def name_of(operator: Operator, words: Collection[str]) -> str:
    """Return the name of the function for constants of which the named ones are words."""
    return "_".join([operator.name, "engine", *words])


def functions(operator: Operator, words: Collection[str]) -> list[onnx.FunctionProto]:
    """Return the function of a node, and that of one expert, which it calls.

    Args:
        operator: The products of experts.
        words: Formal names of the constants that are INT32 words; others of bytes are floats.
    """
    member = operator.one_of
    if member is None:
        raise ValueError(f"{operator.name} has no experts")
    writer = FunctionWriter()
    node, ints = writer.node, writer.ints
    sizes = [writer.attribute(name) for name in _SIZES]
    count = writer.size("codes", 0)
    every = node("Range", ints(0), node("Squeeze", count, ints([0])), ints(1))
    is_its = node("Equal", node("Unsqueeze", NUMBERS, ints([1])), node("Unsqueeze", every, ints([0])))  # (S, E)
    sent = node("ReduceMax", node("Cast", is_its, to=TensorProto.FLOAT), ints([0]), keepdims=0)
    writer.call("", "TopK", [sent, count], ["largest", "order"], [helper.make_attribute("axis", 0)])
    node("Cast", node("ReduceSum", sent, ints([0]), keepdims=0), to=TensorProto.INT64, output="chosen")
    shape = node("Concat", node("Shape", "x", start=0, end=1), sizes[1], axis=0)
    empty = node("Expand", node("CastLike", writer.floats(0), "x"), shape)
    # With both a most of turns and a condition: the parser knows neither left out.
    most, begin = node("Squeeze", count, ints([0])), node("Greater", "chosen", ints(0))
    one = f"{experts.PRODUCT}{name_of(operator, words)}"
    node("Loop", most, begin, empty, output="y", body=_turn(member, one, sizes))
    attributes = [item.name for item in operator.attributes]
    whole = writer.named(name_of(operator, words), operator.input_names(), ["y"], attributes)
    inner = _WordWriter(words)
    product.write(inner, member, *_SIZES)
    return [whole, inner.named(one, [*member.input_names(), *_SIZES], ["y"])]


def _turn(member: Operator, one: str, sizes: list[str]) -> onnx.GraphProto:
    """Return the body of the loop: the product of one expert, put into those rows of y that are its own."""
    turn = experts.Turn()
    node = turn.node
    expert = node("Gather", "order", "turn", output="expert", axis=0)
    node("Constant", output="one", value_ints=[1])
    mask = node("Unsqueeze", node("Equal", NUMBERS, expert, output="is_its"), "one", output="mask")
    constants = [node("Gather", name, expert, output=f"its_{name}", axis=0) for name in member.constants()]
    part = node(one, "x", *constants, *sizes, output="its_y", domain=contract.DOMAIN)
    node("Where", mask, part, "y_before", output="y_after")
    once = node("Squeeze", "one", output="once")
    node("Less", node("Add", "turn", once, output="next"), "chosen", output="on_after")
    return turn.graph()


class _WordWriter(FunctionWriter):
    """Takes constants of bytes apart where others have a DequantizeLinear."""

    def __init__(self, words: Collection[str]) -> None:
        super().__init__()
        self._words = words

    def dequantize(self, codes: str) -> str:
        """Return the elements of a constant in float32, of words (..., n) as (..., 4 n)."""
        if codes not in self._words:
            return codes
        node, ints = self.node, self.ints
        # Halves of 16 bits, which float32 holds. Division of integers may round down or to zero: both are mended.
        half = self._integer(1 << 16)
        high = node("Div", codes, half)
        low = node("Sub", codes, node("Mul", high, half))
        below = node("Cast", node("Less", low, self._integer(0)), to=TensorProto.INT32)
        high, low = node("Sub", high, below), node("Add", low, node("Mul", below, half))
        # The upper half is signed: with 2**15 added its upper byte is that of the element plus 128.
        high = node("Add", node("Cast", high, to=TensorProto.FLOAT), self.floats(1 << 15))
        first, second = self._bytes(node("Cast", low, to=TensorProto.FLOAT))
        third, fourth = self._bytes(high)
        elements = [*map(self._signed, (first, second, third)), node("Sub", fourth, self.floats(128))]
        joined = node("Concat", *(node("Unsqueeze", element, ints([-1])) for element in elements), axis=-1)
        if codes in FLAT:
            rows, columns = (size if isinstance(size, str) else ints([size]) for size in FLAT[codes])
            return node("Reshape", joined, node("Concat", rows, columns, axis=0))
        return node("Reshape", joined, node("Concat", node("Shape", codes, start=0, end=-1), ints([-1]), axis=0))

    def _integer(self, value: int) -> str:
        return self.node("Cast", self.ints(value), to=TensorProto.INT32)

    def _bytes(self, halves: str) -> tuple[str, str]:
        """Return lower and upper bytes of numbers in [0, 2**16)."""
        upper = self.node("Floor", self.node("Mul", halves, self.floats(1 / 256)))
        return self.node("Sub", halves, self.node("Mul", upper, self.floats(256))), upper

    def _signed(self, byte: str) -> str:
        """Return bytes in [0, 256) as the elements of INT8."""
        top = self.node("Floor", self.node("Mul", byte, self.floats(1 / 128)))
        return self.node("Sub", byte, self.node("Mul", top, self.floats(256)))
