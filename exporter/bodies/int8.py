"""The roundings of `rankbook.plugins.int8` in standard ONNX: parts of the bodies of operators that round x."""

from __future__ import annotations

from onnx import TensorProto

from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins.int8 import LARGEST_LEVEL, SMALLEST, TOP


def rounded_input(writer: FunctionWriter, in_features: str) -> str:
    """Return x (..., K) in float32, each of its groups rounded to 8 bits."""
    node = writer.node
    groups = node("Max", writer.size("params", 1), writer.size("step", 1))  # one of them may be a single number
    x = node("Cast", "x", to=TensorProto.FLOAT)
    cut = node("Reshape", x, node("Concat", writer.ints([-1]), groups, node("Div", in_features, groups), axis=0))
    return node("Reshape", _rounded(writer, cut), node("Shape", "x"))


def rounded_levels(writer: FunctionWriter, levels: str) -> str:
    """Return levels (Q, L) of which rows that are not whole numbers in a byte's range are rounded to 8 bits."""
    node, limit = writer.node, writer.floats(LARGEST_LEVEL)
    strange = node("Not", node("Equal", levels, node("Round", levels)))
    large = node("Greater", node("Abs", levels), limit)
    some = _reduced(writer, "ReduceMax", node("Cast", node("Or", strange, large), to=TensorProto.FLOAT))
    span = node("Sub", _reduced(writer, "ReduceMax", levels), _reduced(writer, "ReduceMin", levels))
    rounds = node("Or", node("Greater", some, writer.floats(0)), node("Greater", span, limit))
    return node("Where", rounds, _rounded(writer, levels), levels)


def rounded_factor(writer: FunctionWriter, factor: str) -> str:
    """Return ``down`` (R, K), its rows rounded to 8 bits where it is not stored as int8 (where its codes are one)."""
    node = writer.node
    plain = node("Equal", node("Size", "down"), writer.ints(1))
    return node("Where", plain, _rounded(writer, factor), factor)


def _rounded(writer: FunctionWriter, rows: str) -> str:
    """Return rows (..., K) as `int8.quantize` rounds them, times their scales; a NaN or infinity gives NaN."""
    node = writer.node
    largest = _reduced(writer, "ReduceMax", node("Abs", rows))
    integers = node("Round", node("Mul", rows, node("Div", writer.floats(TOP), largest)))
    values = node("Mul", integers, node("Div", largest, writer.floats(TOP)))
    return node("Where", node("Less", largest, writer.floats(SMALLEST)), node("Mul", rows, writer.floats(0)), values)


def _reduced(writer: FunctionWriter, op_type: str, rows: str) -> str:
    return writer.node(op_type, rows, writer.ints([-1]), keepdims=1)
