"""Bodies of the operators in standard ONNX: what a runtime without the native kernels computes.

A body must keep the codes packed: ONNX Runtime folds constants and TensorRT widens integers unless an INT8 initializer
goes through DequantizeLinear first. From there everything is float32 arithmetic on bytes, for two reasons that were
measured in ONNX Runtime (2048 x 2048 weights, one row of x, 2 cores): a Gather that turns each byte into its codes
costs 4 ns a byte and transposing codes 4 ns a code, while Mul, Floor and Sub run at memory speed (8 to 10 ms against
37 to 40 ms in all). Hence the codes are not brought into their natural order:

* *units* are the bytes of a row (for 3 bits the triples of bytes); a unit holds ``c`` codes (*fields*) of ``c``
  consecutive inputs, and the weight is decoded as (rows, fields, units);
* x, which is small, is permuted to match: (units, fields) to (fields, units).

What directly follows a DequantizeLinear is arithmetic or a Flatten: of a Reshape or a Transpose there, which only move
the numbers, the optimizers of ONNX Runtime before 1.28 make a QuantizeLinear, for which 1.23 has no kernel.

The padding of rows and columns to whole panels and blocks is decoded too; x is padded with zeros, y is cut.

Operators that round x to 8 bits (`rankbook.plugins.int8`) have the same body behind a rounding of x, of levels that
are not whole numbers and of first factors that are not stored as int8, in the float32 operations of the definition, so
that every rounded number is the same. The integers are multiplied by their scales before the product and not after it:
the same sum in another order, in float32 throughout, whose results differ by the roundings of a float32 sum alone.
Products of integers, group by group, would have to keep N numbers for each token and group.
"""

from __future__ import annotations

from onnx import TensorProto

from rankbook.exporter.functions import FunctionWriter

FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}
ORDER_3 = [0, 2, 4, 1, 3, 5, 6, 7]
"""Order in which the fields of a 3-bit unit come out of its bytes A, B and C."""


def group_params(writer: FunctionWriter) -> str:
    """Return the group parameters in float32, (NP, G, Q, 32)."""
    codes = writer.dequantize("params")
    scaled = writer.node("Mul", codes, writer.node("Cast", "step", to=TensorProto.FLOAT))
    return writer.node("Add", scaled, "base")


def fields_of(writer: FunctionWriter, words: str, bits: int) -> str:
    """Turn bytes (A, B, 1 or 3, units) in float32 into codes (A, B, fields, units)."""
    node, floats = writer.node, writer.floats
    if bits == 8:
        return words
    if bits == 3:
        return _fields_3(writer, words)
    parts, rest = [], words
    for field in range(1, FIELDS[bits]):
        above = node("Floor", node("Mul", words, floats(2.0 ** (-bits * field))))
        parts.append(node("Sub", rest, node("Mul", above, floats(1 << bits))))
        rest = above
    return node("Concat", *parts, rest, axis=2)


def _fields_3(writer: FunctionWriter, value: str) -> str:
    """Decode the bytes A, B, C of `layout` for 3 bits; the codes come in `ORDER_3`."""
    node, floats, ints = writer.node, writer.floats, writer.ints
    above3 = node("Floor", node("Mul", value, floats(1 / 8)))
    above6 = node("Floor", node("Mul", value, floats(1 / 64)))
    even = node("Sub", value, node("Mul", above3, floats(8)))  # c0 c2 c4
    odd = node("Sub", above3, node("Mul", above6, floats(8)))  # c1 c3 c5
    low = node("Gather", above6, ints([0, 1]), axis=2)  # two low bits of c6 and c7
    high = node("Gather", above6, ints([2]), axis=2)  # their high bits, together
    high7 = node("Floor", node("Mul", high, floats(0.5)))
    high6 = node("Sub", high, node("Mul", high7, floats(2)))
    last = node("Add", low, node("Mul", node("Concat", high6, high7, axis=2), floats(4)))
    return node("Concat", even, odd, last, axis=2)


def group_starts(writer: FunctionWriter, in_features: str, units: str, groups: str, bits: int) -> str:
    """Return, for each (field, unit), where the codebook of its group starts in a row of tables; float32.

    Exact: the largest number is G * L, far below 2**24.
    """
    node, ints = writer.node, writer.ints
    count = FIELDS[bits]
    inputs = node("Range", ints(0), scalar(writer, node("Mul", units, ints([count]))), ints(1))
    group = node("Div", inputs, node("Div", in_features, groups))
    group = node("Min", group, node("Sub", groups, ints([1])))  # the padding belongs to no group
    starts = node("Transpose", node("Reshape", node("Mul", group, ints([1 << bits])), ints([-1, count])), perm=[1, 0])
    if bits == 3:
        starts = node("Gather", starts, ints(ORDER_3), axis=0)
    return node("Cast", starts, to=TensorProto.FLOAT)


def look_up(writer: FunctionWriter, table: str, index: str) -> str:
    """Look indices (A, B, fields, units) up in tables (A, B, G, L); the result is (A * B, fields * units)."""
    node, ints = writer.node, writer.ints
    index = node("Reshape", node("Cast", index, to=TensorProto.INT32), ints([0, 0, -1]))
    table = node("Reshape", table, ints([0, 0, -1]))
    return node("GatherElements", node("Flatten", table, axis=2), node("Flatten", index, axis=2), axis=1)


def scalar(writer: FunctionWriter, value: str) -> str:
    """Return a tensor of shape (1,) as one of shape ()."""
    return writer.node("Squeeze", value, writer.ints([0]))
