"""Stores keys and values in fewer bits than activations, as inputs and outputs of the graph: INT8 or float16."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence

import onnx_ir as ir

from rankbook.exporter.cache_names import INDEX, PAST, PRESENT, layer_of, part_of
from rankbook.exporter.rewrite import Writer

SCALE = "_scale"
"""Ends the names of scales: ``past_key_values.0.key`` and its ``past_key_values.0.key_scale``."""
_JOINS = {("Concat", 2), ("TensorScatter", 3)}
"""Operators that put new keys or values behind the past, and the number of their inputs."""
_SMALLEST = {ir.DataType.FLOAT16: 1e-7}
_SMALLEST_WIDE = 1e-30
"""Lower bounds of a scale, so that a token of zeros can be divided by it; float16 has no smaller numbers."""


def cache_layers(values: Iterable[ir.Value]) -> int:
    """Return of how many layers there are keys among the inputs or outputs of a graph."""
    return sum(str(value.name).startswith((PAST, PRESENT)) and str(value.name).endswith(".key") for value in values)


def nearest_layer(keys: ir.Value) -> int:
    """Return the number of the layer whose attention reads some keys: that of the nearest cache before them."""
    near, seen = [keys], {keys}
    for value in near:  # grows meanwhile
        if str(value.name).startswith(PAST):
            return layer_of(str(value.name))
        node = value.producer()
        new = [item for item in (node.inputs if node else ()) if item is not None and item not in seen]
        seen.update(new)
        near += new
    raise ValueError(f"{keys.name!r} does not depend on a cache")


class QuantizeCache(ir.passes.InPlacePass):
    """Replaces each ``Concat(past, new)`` or ``TensorScatter`` of the cache by the same on INT8 codes and on scales.

    Keys are stored as attention sees them, after the rotary embedding: ``scale = max|x| / 127`` over one head of one
    token, ``codes = clamp(round(x / scale))``, symmetric. Attention reads ``codes * scale`` for new tokens as well, so
    a prompt in one call and token by token gives the same. Keys of an indexer stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: There are no keys and values, or they are not joined with new ones in one node.
        """
        graph = model.graph
        scales: dict[str, tuple[ir.Value, ir.Value]] = {}
        for past in list(graph.inputs):
            name = str(past.name)
            if _is_stored(name):
                scales[name] = _quantize(graph, past)
        if not scales:
            raise ValueError(
                "the model keeps no keys and values that --kv int8 could store in 8 bits; export with --kv float"
            )
        _insert(graph.inputs, {name: pair[0] for name, pair in scales.items()})
        _insert(graph.outputs, {name.replace(PAST, PRESENT): pair[1] for name, pair in scales.items()})
        return ir.passes.PassResult(model, modified=bool(scales))


class HalveCache(ir.passes.InPlacePass):
    """Replaces each ``Concat(past, new)`` or ``TensorScatter`` of the cache by the same on float16.

    As with `QuantizeCache`, attention reads new tokens as they are stored. Keys of an indexer stay as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place.

        Raises:
            ValueError: There are no keys and values, or they are not joined with new ones in one node.
        """
        pasts = [past for past in model.graph.inputs if _is_stored(str(past.name))]
        if not pasts:
            raise ValueError("the model keeps no keys and values to store in float16; export with --kv float")
        for past in pasts:
            _halve(model.graph, past)
        return ir.passes.PassResult(model, modified=True)


def _is_stored(name: str) -> bool:
    """Say whether an input is rounded: keys and values are; rounded keys of an indexer would choose other tokens."""
    return name.startswith(PAST) and part_of(name) != INDEX


def _halve(graph: ir.Graph, past: ir.Value) -> None:
    """Rewrite one cache tensor."""
    join = _join(graph, past)
    new, present = join.inputs[1], join.outputs[0]
    if present.dtype is None:
        raise ValueError(f"the cache tensor {past.name!r} has no type")
    writer = Writer(graph, str(present.name))
    past.type = ir.TensorType(ir.DataType.FLOAT16)
    rounded = writer.op("Cast", new, to=ir.DataType.FLOAT16)
    rounded.type = past.type
    joined = writer.node(join.op_type, [past, rounded, *join.inputs[2:]], {"axis": 2}).outputs[0]
    values = writer.op("Cast", joined, like=present, to=present.dtype)
    joined.type, joined.shape = past.type, present.shape
    _take_place(graph, join, writer, joined, values)


def _quantize(graph: ir.Graph, past: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rewrite one cache tensor; return the scales of the past and of the present."""
    join = _join(graph, past)
    new, present = join.inputs[1], join.outputs[0]
    dtype, name = present.dtype, str(present.name)
    if new is None or dtype is None or past.shape is None or present.shape is None:
        raise ValueError(f"the cache tensor {past.name!r} has no type or shape")
    writer = Writer(graph, name)
    # Types first: what reads the past now reads codes.
    past.type = ir.TensorType(ir.DataType.INT8)
    old_scale = ir.Value(
        name=f"{past.name}{SCALE}", type=ir.TensorType(dtype), shape=ir.Shape([*past.shape.dims[:-1], 1])
    )
    peak = writer.op("ReduceMax", writer.op("Abs", new), writer.ints(-1), keepdims=1)
    step = writer.op("Div", peak, writer.number(127.0, dtype))
    step = writer.op("Max", step, writer.number(_smallest(dtype), dtype))
    one, zero = writer.number(1.0, dtype), writer.number(0, ir.DataType.INT8)
    codes = writer.op("QuantizeLinear", writer.op("Div", new, step), one, zero)
    joined, scales = (
        writer.node(join.op_type, [old, part, *join.inputs[2:]], {"axis": 2}).outputs[0]
        for old, part in ((past, codes), (old_scale, step))
    )
    values = writer.op("Mul", writer.op("DequantizeLinear", joined, one, zero), scales, like=present)
    joined.type, joined.shape = ir.TensorType(ir.DataType.INT8), present.shape
    scales.type, scales.shape = ir.TensorType(dtype), ir.Shape([*present.shape.dims[:-1], 1])
    _take_place(graph, join, writer, joined, values)
    scales.name = f"{name}{SCALE}"
    return old_scale, scales


def _take_place(graph: ir.Graph, join: ir.Node, writer: Writer, joined: ir.Value, values: ir.Value) -> None:
    """Put the writer's nodes where ``join`` was; ``joined`` is the graph's output now, ``values`` what others read."""
    present = join.outputs[0]
    index = next(i for i, output in enumerate(graph.outputs) if output is present)
    graph.insert_after(join, writer.nodes)
    graph.outputs[index] = joined
    present.replace_all_uses_with(values)
    graph.remove(join, safe=True)
    present.name, joined.name = f"{present.name}.float", present.name


def _join(graph: ir.Graph, past: ir.Value) -> ir.Node:
    """Return the node that joins the past with what is new and whose output is the present."""
    for node in past.consumers():
        joins = (node.op_type, len(node.inputs)) in _JOINS and node.inputs[0] is past
        if joins and any(output is node.outputs[0] for output in graph.outputs):
            return node
    raise ValueError(
        f"the cache tensor {past.name!r} is not joined with new ones in one node, so it cannot be rounded;"
        " export with --kv float"
    )


def _insert(values: MutableSequence[ir.Value], scales: dict[str, ir.Value]) -> None:
    """Put each scale behind its codes."""
    ordered = [item for value in values for item in (value, scales.get(str(value.name))) if item is not None]
    values.clear()
    values.extend(ordered)


def _smallest(dtype: ir.DataType) -> float:
    return _SMALLEST.get(dtype, _SMALLEST_WIDE)
