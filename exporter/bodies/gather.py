"""The bodies of operators that look rows of a packed matrix up; see `rankbook.exporter.bodies.packed`."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from rankbook.exporter.bodies.packed import (
    FIELDS,
    ORDER_3,
    fields_of,
    group_params,
    group_starts,
    look_up,
    scalar,
)
from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins import layout
from rankbook.plugins.contract import Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function that looks rows up."""
    writer, bits = FunctionWriter(), operator.bits
    node, ints = writer.node, writer.ints
    in_features = writer.attribute("in_features")
    ids = node("Reshape", "indices", ints([-1, 1]))
    ids = node("Slice", ids, ints([0]), ints([1]), ints([1]))  # all of them; see functions.py
    panel = node("Div", ids, ints([layout.PANEL]))
    lane = node("Sub", ids, node("Mul", panel, ints([layout.PANEL])))
    words = writer.dequantize("codes")  # (NP, KB, b, 32, 4)
    order = node("Range", ints(0), scalar(writer, node("Mul", writer.size(words, 1), ints([bits]))), ints(1))
    if bits == 3:  # all A, then all B, then all C
        order = node("Reshape", node("Transpose", node("Reshape", order, ints([-1, 3])), perm=[1, 0]), ints([-1]))
    rows = _rows(writer, node("Flatten", words, axis=4), panel, lane, order)  # (rows, words, 4)
    rows = node("Add", rows, writer.floats(128))
    rows = node("Reshape", rows, ints([0, 3 if bits == 3 else 1, -1]))
    fields = fields_of(writer, node("Unsqueeze", rows, ints([0])), bits)  # (1, rows, fields, units)
    params = group_params(writer)
    groups, planes = writer.size(params, 1), writer.size(params, 2)
    order = node("Range", ints(0), scalar(writer, node("Mul", groups, planes)), ints(1))
    dense = _rows(writer, node("Reshape", params, ints([-1])), panel, lane, order)
    dense = node("Reshape", dense, node("Concat", ints([1]), ints([-1]), groups, planes, axis=0))
    table = node("MatMul", dense, node("Cast", "levels", to=TensorProto.FLOAT))  # (1, rows, G, L)
    units = writer.size(fields, 3)
    values = look_up(writer, table, node("Add", fields, group_starts(writer, in_features, units, groups, bits)))
    values = node("Reshape", values, node("Concat", ints([-1]), ints([FIELDS[bits]]), units, axis=0))
    if bits == 3:
        values = node("Gather", values, ints([ORDER_3.index(i) for i in range(8)]), axis=1)
    values = node("Flatten", node("Transpose", values, perm=[0, 2, 1]), axis=1)
    values = node("Slice", values, ints([0]), in_features, ints([1]))
    node("Reshape", values, node("Concat", node("Shape", "indices"), in_features, axis=0), output="y")
    return writer.function(operator)


def _rows(writer: FunctionWriter, values: str, panel: str, lane: str, order: str) -> str:
    """Pick rows out of values that lie as [panel][order][32 lanes]; panel and lane are (rows, 1)."""
    node, ints = writer.node, writer.ints
    count = node("Shape", order)
    index = node("Add", node("Mul", panel, count), node("Unsqueeze", order, ints([0])))
    return node("Gather", values, node("Add", node("Mul", index, ints([layout.PANEL])), lane), axis=0)
