"""Brings rotary embeddings that torch spelled out into one RotaryEmbedding node each."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import Writer, only_number, producer, standard_nodes


class FuseRotary(ir.passes.InPlacePass):
    """Replaces ``x * cos + rotate_half(x) * sin`` by RotaryEmbedding (RoFormer, Su et al. 2021, in the form of Llama).

    torch's own rewriting does so in float32; in half precision it is stopped by the Cast of cos and sin. Recognized is
    exactly: ``Add(Mul(x, C), Mul(Concat(Neg(second half), first half), S))`` with x (batch, heads, sequence, size), C
    and S ``Unsqueeze(Cast(Cos or Sin(Concat(angles, angles))))`` over the whole size. Everything else stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        halves: dict[str, ir.Value] = {}
        changed = False
        for node in standard_nodes(model.graph, "Add"):
            changed |= _fuse(model.graph, node, halves)
        return ir.passes.PassResult(model, modified=changed)


def _fuse(graph: ir.Graph, add: ir.Node, halves: dict[str, ir.Value]) -> bool:
    plain, rotated = producer(add.inputs[0], "Mul"), producer(add.inputs[1], "Mul")
    if plain is None or rotated is None:
        return False
    x, cos, turned, sin = plain.inputs[0], plain.inputs[1], rotated.inputs[0], rotated.inputs[1]
    if x is None or not _is_rotated(x, turned):
        return False
    tables = _half_table(graph, cos, "Cos", x, halves), _half_table(graph, sin, "Sin", x, halves)
    if None in tables:
        return False
    heads = 0 if x.shape is None or not isinstance(x.shape[1], int) else x.shape[1]
    writer = Writer(graph, str(add.name))
    turned_x = writer.op("RotaryEmbedding", x, *tables, interleaved=0, num_heads=heads)
    writer.replace(add, {add.outputs[0]: turned_x})
    return True


def _is_rotated(x: ir.Value, turned: ir.Value | None) -> bool:
    """Return whether ``turned`` is x with its negated second half before its first half."""
    concat = producer(turned, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negated = producer(concat.inputs[0], "Neg")
    second = producer(None if negated is None else negated.inputs[0], "Slice")
    first = producer(concat.inputs[1], "Slice")
    if first is None or second is None or x.shape is None or not isinstance(x.shape[3], int):
        return False
    half, size = x.shape[3] // 2, x.shape[3]
    return _is_slice(first, x, 0, half, half) and _is_slice(second, x, half, size, size)


def _is_slice(node: ir.Node, x: ir.Value, start: int, end: int, least_end: int) -> bool:
    """Return whether a node is ``x[..., start:end]``; a larger end than ``least_end`` means the whole rest."""
    numbers = [only_number(value) for value in node.inputs[1:]]
    if node.inputs[0] is not x or len(numbers) < 3 or (len(numbers) == 4 and numbers[3] != 1):
        return False
    begins, ends, axis = numbers[:3]
    whole = x.shape is not None and end == x.shape[3]
    right_end = ends is not None and (ends >= least_end if whole else ends == end)
    return begins == start and right_end and axis in (-1, 3)


def _half_table(
    graph: ir.Graph, value: ir.Value | None, op_type: str, x: ir.Value, halves: dict[str, ir.Value]
) -> ir.Value | None:
    """Return cos or sin over half the size, (batch, sequence, size / 2), in the dtype of x; None if it is not one."""
    unsqueeze = producer(value, "Unsqueeze")
    if unsqueeze is None or only_number(unsqueeze.inputs[1]) != 1:
        return None
    source = unsqueeze.inputs[0]
    cast = producer(source, "Cast")
    function = producer(source if cast is None else cast.inputs[0], op_type)
    concat = producer(None if function is None else function.inputs[0], "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.inputs[0] is not concat.inputs[1]:
        return None
    angles = concat.inputs[0]
    if (
        angles is None
        or angles.shape is None
        or x.shape is None
        or x.dtype is None
        or x.shape[3] != 2 * angles.shape[2]
    ):
        return None
    key = f"rotary.{op_type}.{angles.name}.{x.dtype}"
    if key not in halves:
        writer = Writer(graph, key)
        halves[key] = writer.op("Cast", writer.op(op_type, angles, like=angles), like=angles, to=x.dtype)
        halves[key].type = ir.TensorType(x.dtype)
        graph.insert_before(unsqueeze, writer.nodes)
    return halves[key]
