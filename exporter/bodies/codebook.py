"""Bodies of the operators in standard ONNX: what a runtime without our kernels computes.

A body must keep the codes packed: ONNX Runtime folds constants and TensorRT widens integers unless an INT8 initializer
goes through DequantizeLinear first. From there everything is float32 arithmetic on bytes, for two reasons that were
measured in ONNX Runtime (2048 x 2048 weights, one row of x, 2 cores): a Gather that turns each byte into its codes
costs 4 ns a byte and transposing codes 4 ns a code, while Mul, Floor and Sub run at memory speed (8 to 10 ms against
37 to 40 ms in all). Hence the codes are not brought into their natural order:

* *units* are the bytes of a row (for 3 bits the triples of bytes); a unit holds ``c`` codes (*fields*) of ``c``
  consecutive inputs, and the weight is decoded as (rows, fields, units);
* x, which is small, is permuted to match: (units, fields) to (fields, units).

The padding of rows and columns to whole panels and blocks is decoded too; x is padded with zeros, y is cut.

Operators that round x to 8 bits (`rankbook.plugins.int8`) have the same body behind a rounding of x, of levels that
are not whole numbers and of first factors that are not stored as int8, in the float32 operations of the definition, so
that every rounded number is the same. The integers are multiplied by their scales before the product and not after it:
the same sum in another order, in float32 throughout, whose results differ by the roundings of a float32 sum alone.
Products of integers, group by group, would have to keep N numbers for each token and group.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import onnx
from onnx import TensorProto, helper

from rankbook.exporter.bodies import int8 as int8_body
from rankbook.exporter.functions import FunctionWriter, dequantize_function
from rankbook.plugins import contract, layout, merged

_MOST_AXES = 5
"""Of a constant."""
_FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}
_ORDER_3 = [0, 2, 4, 1, 3, 5, 6, 7]
"""Order in which the fields of a 3-bit unit come out of its bytes A, B and C."""


def functions(op_types: Iterable[str]) -> list[onnx.FunctionProto]:
    """Return the functions that a file with these operators needs, each once.

    Raises:
        KeyError: There is no such operator.
    """
    names = set(op_types)
    several = sorted(names & set(merged.OPERATORS))
    alone = sorted((names - set(several)) | {merged.OPERATORS[name].member.name for name in several})
    return [*map(merged_body, several), *map(body, alone), dequantize_function()]


@cache
def body(op_type: str) -> onnx.FunctionProto:
    """Return the function that computes operator ``op_type``.

    Raises:
        KeyError: There is no such operator.
    """
    operator = contract.OPERATORS[op_type]
    writer = FunctionWriter()
    if operator.kind == contract.GATHER:
        _gather(writer, operator.bits)
    else:
        _matmul(writer, operator)
    return writer.function(
        contract.DOMAIN,
        operator.name,
        list(operator.input_names()),
        [port.name for port in operator.outputs],
        [attribute.name for attribute in operator.attributes],
    )


def merged_body(op_type: str) -> onnx.FunctionProto:
    """Return the function that computes an operator of several products, by the functions of each.

    Raises:
        KeyError: There is no such operator.
    """
    operator = merged.OPERATORS[op_type]
    member, writer = operator.member, FunctionWriter()
    for i in range(operator.count):
        inputs = [
            _part(writer, f"{name}_{i}") if name in operator.parts else writer.tensor_attribute(f"{name}_{i}")
            for name in member.constants()
        ]
        attributes = [
            helper.make_attribute(item.name, item.value)
            if item.kind == "string"
            else onnx.AttributeProto(name=item.name, type=onnx.AttributeProto.INT, ref_attr_name=f"{item.name}_{i}")
            for item in member.attributes
        ]
        writer.call(member.name, [operator.inputs[0], *inputs], operator.outputs[i], *attributes)
    names = list(operator.inputs), list(operator.outputs), list(operator.attributes)
    return writer.function(contract.DOMAIN, operator.name, *names)


def _part(writer: FunctionWriter, attribute: str) -> str:
    """Cut a constant out of the tensor that holds them; the attribute is its first byte and its shape."""
    node, ints = writer.node, writer.ints
    place = writer.list_attribute(attribute)
    start = node("Slice", place, ints([0]), ints([1]))
    shape = node("Slice", place, ints([1]), ints([_MOST_AXES + 1]))
    end = node("Add", start, node("ReduceProd", shape, keepdims=1))
    return node("Reshape", node("Slice", merged.DATA, start, end), shape)


def _matmul(writer: FunctionWriter, operator: contract.OpContract) -> None:
    node, ints, bits = writer.node, writer.ints, operator.bits
    in_features, out_features = writer.attribute("in_features"), writer.attribute("out_features")
    x = int8_body.rounded_input(writer, in_features) if operator.int8_activations else "x"
    padded = _padded(writer, x, in_features)  # before the first dequantize, see functions.py
    words = writer.dequantize("codes")  # (NP, KB, b, 32, 4)
    words = node("Transpose", words, perm=[0, 3, 2, 1, 4] if bits == 3 else [0, 3, 1, 2, 4])
    words = node("Reshape", words, ints([0, 0, 3 if bits == 3 else 1, -1]))  # (NP, 32, 1 or 3, units)
    params = node("Transpose", _params(writer), perm=[0, 3, 1, 2])  # (NP, 32, G, Q)
    levels = node("Cast", "levels", to=TensorProto.FLOAT)
    if operator.int8_activations:
        levels = int8_body.rounded_levels(writer, levels)
    table = node("MatMul", params, levels)
    fields = _fields(writer, words, bits)  # (NP, 32, fields, units)
    index = node("Add", fields, _group_starts(writer, in_features, writer.size(fields, 3), writer.size(table, 2), bits))
    weight = node("CastLike", _look_up(writer, table, index), x)
    product = node("Gemm", _permuted(writer, padded, writer.size(fields, 3), bits), weight, transB=1)
    product = node("Slice", product, ints([0]), out_features, ints([1]))
    product = node("Reshape", product, node("Concat", node("Shape", "x", start=0, end=-1), out_features, axis=0))
    if operator.low_rank:
        product = node("Add", product, _branch(writer, x, rounded=operator.int8_activations))
    total = node("Add", product, node("CastLike", "bias", x))
    node("CastLike", total, "x", output="y")


def _gather(writer: FunctionWriter, bits: int) -> None:
    node, ints = writer.node, writer.ints
    in_features = writer.attribute("in_features")
    ids = node("Reshape", "indices", ints([-1, 1]))
    ids = node("Slice", ids, ints([0]), ints([1]), ints([1]))  # all of them; see functions.py
    panel = node("Div", ids, ints([layout.PANEL]))
    lane = node("Sub", ids, node("Mul", panel, ints([layout.PANEL])))
    words = writer.dequantize("codes")  # (NP, KB, b, 32, 4)
    order = node("Range", ints(0), _scalar(writer, node("Mul", writer.size(words, 1), ints([bits]))), ints(1))
    if bits == 3:  # all A, then all B, then all C
        order = node("Reshape", node("Transpose", node("Reshape", order, ints([-1, 3])), perm=[1, 0]), ints([-1]))
    rows = _rows(writer, node("Reshape", words, ints([-1, 4])), panel, lane, order)  # (rows, words, 4)
    rows = node("Reshape", rows, ints([0, 3 if bits == 3 else 1, -1]))
    fields = _fields(writer, node("Unsqueeze", rows, ints([0])), bits)  # (1, rows, fields, units)
    params = _params(writer)
    groups, planes = writer.size(params, 1), writer.size(params, 2)
    order = node("Range", ints(0), _scalar(writer, node("Mul", groups, planes)), ints(1))
    dense = _rows(writer, node("Reshape", params, ints([-1])), panel, lane, order)
    dense = node("Reshape", dense, node("Concat", ints([1]), ints([-1]), groups, planes, axis=0))
    table = node("MatMul", dense, node("Cast", "levels", to=TensorProto.FLOAT))  # (1, rows, G, L)
    units = writer.size(fields, 3)
    values = _look_up(writer, table, node("Add", fields, _group_starts(writer, in_features, units, groups, bits)))
    values = node("Reshape", values, node("Concat", ints([-1]), ints([_FIELDS[bits]]), units, axis=0))
    if bits == 3:
        values = node("Gather", values, ints([_ORDER_3.index(i) for i in range(8)]), axis=1)
    values = node("Flatten", node("Transpose", values, perm=[0, 2, 1]), axis=1)
    values = node("Slice", values, ints([0]), in_features, ints([1]))
    node("Reshape", values, node("Concat", node("Shape", "indices"), in_features, axis=0), output="y")


def _rows(writer: FunctionWriter, values: str, panel: str, lane: str, order: str) -> str:
    """Pick rows out of values that lie as [panel][order][32 lanes]; panel and lane are (rows, 1)."""
    node, ints = writer.node, writer.ints
    count = node("Shape", order)
    index = node("Add", node("Mul", panel, count), node("Unsqueeze", order, ints([0])))
    return node("Gather", values, node("Add", node("Mul", index, ints([layout.PANEL])), lane), axis=0)


def _params(writer: FunctionWriter) -> str:
    """Return the group parameters in float32, (NP, G, Q, 32)."""
    codes = writer.dequantize("params")
    scaled = writer.node("Mul", codes, writer.node("Cast", "step", to=TensorProto.FLOAT))
    return writer.node("Add", scaled, "base")


def _fields(writer: FunctionWriter, words: str, bits: int) -> str:
    """Turn signed bytes (A, B, 1 or 3, units) in float32 into codes (A, B, fields, units)."""
    node, floats = writer.node, writer.floats
    value = node("Add", words, floats(128))
    if bits == 8:
        return value
    if bits == 3:
        return _fields_3(writer, value)
    parts, rest = [], value
    for field in range(1, _FIELDS[bits]):
        above = node("Floor", node("Mul", value, floats(2.0 ** (-bits * field))))
        parts.append(node("Sub", rest, node("Mul", above, floats(1 << bits))))
        rest = above
    return node("Concat", *parts, rest, axis=2)


def _fields_3(writer: FunctionWriter, value: str) -> str:
    """Decode the bytes A, B, C of `layout` for 3 bits; the codes come in `_ORDER_3`."""
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


def _group_starts(writer: FunctionWriter, in_features: str, units: str, groups: str, bits: int) -> str:
    """Return, for each (field, unit), where the codebook of its group starts in a row of tables; float32.

    Exact: the largest number is G * L, far below 2**24.
    """
    node, ints = writer.node, writer.ints
    count = _FIELDS[bits]
    inputs = node("Range", ints(0), _scalar(writer, node("Mul", units, ints([count]))), ints(1))
    group = node("Div", inputs, node("Div", in_features, groups))
    group = node("Min", group, node("Sub", groups, ints([1])))  # the padding belongs to no group
    starts = node("Transpose", node("Reshape", node("Mul", group, ints([1 << bits])), ints([-1, count])), perm=[1, 0])
    if bits == 3:
        starts = node("Gather", starts, ints(_ORDER_3), axis=0)
    return node("Cast", starts, to=TensorProto.FLOAT)


def _look_up(writer: FunctionWriter, table: str, index: str) -> str:
    """Look indices (A, B, fields, units) up in tables (A, B, G, L); the result is (A * B, fields * units)."""
    node, ints = writer.node, writer.ints
    index = node("Reshape", node("Cast", index, to=TensorProto.INT32), ints([0, 0, -1]))
    table = node("Reshape", table, ints([0, 0, -1]))
    return node("GatherElements", node("Flatten", table, axis=2), node("Flatten", index, axis=2), axis=1)


def _padded(writer: FunctionWriter, x: str, in_features: str) -> str:
    """Return x padded with zeros to whole blocks."""
    node, ints = writer.node, writer.ints
    missing = node("Sub", node("Mul", writer.size("codes", 1), ints([layout.BLOCK])), in_features)
    return node("Pad", x, node("Concat", ints([0]), missing, axis=0), "", ints([-1]))


def _permuted(writer: FunctionWriter, x: str, units: str, bits: int) -> str:
    """Return padded x as (rows, fields * units), in the order of the decoded weight."""
    node, ints = writer.node, writer.ints
    count = ints([_FIELDS[bits]])
    x = node("Transpose", node("Reshape", x, node("Concat", ints([-1]), units, count, axis=0)), perm=[0, 2, 1])
    if bits == 3:
        x = node("Gather", x, ints(_ORDER_3), axis=1)
    return node("Flatten", x, axis=1)


def _branch(writer: FunctionWriter, x: str, *, rounded: bool) -> str:
    """Return ``(x @ down.T) @ up.T``."""
    value = x
    for name in ("down", "up"):
        factor = writer.dequantize(name)
        factor = writer.node("Mul", factor, writer.node("Cast", f"{name}_scale", to=TensorProto.FLOAT))
        if rounded and name == "down":
            factor = int8_body.rounded_factor(writer, factor)
        factor = writer.node("Transpose", writer.node("CastLike", factor, x), perm=[1, 0])
        value = writer.node("MatMul", value, factor)
    return value


def _scalar(writer: FunctionWriter, value: str) -> str:
    return writer.node("Squeeze", value, writer.ints([0]))
