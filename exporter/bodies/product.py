"""The bodies of products, exact or of rounded x; see `rankbook.exporter.bodies.packed`."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from rankbook.exporter.bodies import int8
from rankbook.exporter.bodies.packed import (
    FIELDS,
    ORDER_3,
    fields_of,
    group_params,
    group_starts,
    look_up,
)
from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins import layout
from rankbook.plugins.contract import Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function that computes a product."""
    writer = FunctionWriter()
    write(writer, operator, writer.attribute("in_features"), writer.attribute("out_features"))
    return writer.function(operator)


def write(writer: FunctionWriter, operator: Operator, in_features: str, out_features: str) -> None:
    """Append the nodes of a product; the names are those of its sizes, int64 (1,)."""
    node, ints, bits = writer.node, writer.ints, operator.bits
    x = int8.rounded_input(writer, in_features) if operator.int8_activations else "x"
    padded = _padded(writer, x, in_features)  # before the first dequantize, see functions.py
    words = node("Add", writer.dequantize("codes"), writer.floats(128))  # (NP, KB, b, 32, 4)
    words = node("Transpose", words, perm=[0, 3, 2, 1, 4] if bits == 3 else [0, 3, 1, 2, 4])
    words = node("Reshape", words, ints([0, 0, 3 if bits == 3 else 1, -1]))  # (NP, 32, 1 or 3, units)
    params = node("Transpose", group_params(writer), perm=[0, 3, 1, 2])  # (NP, 32, G, Q)
    levels = node("Cast", "levels", to=TensorProto.FLOAT)
    if operator.int8_activations:
        levels = int8.rounded_levels(writer, levels)
    table = node("MatMul", params, levels)
    fields = fields_of(writer, words, bits)  # (NP, 32, fields, units)
    index = node("Add", fields, group_starts(writer, in_features, writer.size(fields, 3), writer.size(table, 2), bits))
    weight = node("CastLike", look_up(writer, table, index), x)
    product = node("Gemm", _permuted(writer, padded, writer.size(fields, 3), bits), weight, transB=1)
    product = node("Slice", product, ints([0]), out_features, ints([1]))
    product = node("Reshape", product, node("Concat", node("Shape", "x", start=0, end=-1), out_features, axis=0))
    if operator.low_rank:
        product = node("Add", product, _branch(writer, x, rounded=operator.int8_activations))
    total = node("Add", product, node("CastLike", "bias", x))
    node("CastLike", total, "x", output="y")


def _padded(writer: FunctionWriter, x: str, in_features: str) -> str:
    """Return x padded with zeros to whole blocks."""
    node, ints = writer.node, writer.ints
    missing = node("Sub", node("Mul", writer.size("codes", 1), ints([layout.BLOCK])), in_features)
    return node("Pad", x, node("Concat", ints([0]), missing, axis=0), "", ints([-1]))


def _permuted(writer: FunctionWriter, x: str, units: str, bits: int) -> str:
    """Return padded x as (rows, fields * units), in the order of the decoded weight."""
    node, ints = writer.node, writer.ints
    count = ints([FIELDS[bits]])
    x = node("Transpose", node("Reshape", x, node("Concat", ints([-1]), units, count, axis=0)), perm=[0, 2, 1])
    if bits == 3:
        x = node("Gather", x, ints(ORDER_3), axis=1)
    return node("Flatten", x, axis=1)


def _branch(writer: FunctionWriter, x: str, *, rounded: bool) -> str:
    """Return ``(x @ down.T) @ up.T``."""
    value = x
    for name in ("down", "up"):
        factor = writer.dequantize(name)
        factor = writer.node("Mul", factor, writer.node("Cast", f"{name}_scale", to=TensorProto.FLOAT))
        if rounded and name == "down":
            factor = int8.rounded_factor(writer, factor)
        factor = writer.node("Transpose", writer.node("CastLike", factor, x), perm=[1, 0])
        value = writer.node("MatMul", value, factor)
    return value
