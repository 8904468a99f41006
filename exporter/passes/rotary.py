"""Brings rotary embeddings that torch spelled out into one RotaryEmbedding node each."""

from __future__ import annotations

import onnx_ir as ir


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
        for node in list(model.graph):
            changed |= node.op_type == "Add" and _fuse(model.graph, node, halves)
        return ir.passes.PassResult(model, modified=changed)


def _fuse(graph: ir.Graph, add: ir.Node, halves: dict[str, ir.Value]) -> bool:
    plain, rotated = _producer(add.inputs[0], "Mul"), _producer(add.inputs[1], "Mul")
    if plain is None or rotated is None:
        return False
    x, cos, turned, sin = plain.inputs[0], plain.inputs[1], rotated.inputs[0], rotated.inputs[1]
    if x is None or not _is_rotated(x, turned):
        return False
    tables = _half_table(graph, cos, "Cos", x, halves), _half_table(graph, sin, "Sin", x, halves)
    if None in tables:
        return False
    old = add.outputs[0]
    heads = 0 if x.shape is None or not isinstance(x.shape[1], int) else x.shape[1]
    attributes = {"interleaved": 0, "num_heads": heads}
    node = ir.node("RotaryEmbedding", [x, *tables], attributes, name=f"{add.name}.rotary")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, add, [add], [node], [old], [node.outputs[0]])
    return True


def _is_rotated(x: ir.Value, turned: ir.Value | None) -> bool:
    """Return whether ``turned`` is x with its negated second half before its first half."""
    concat = _producer(turned, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes["axis"].as_int() not in (-1, 3):
        return False
    negated = _producer(concat.inputs[0], "Neg")
    second = _producer(None if negated is None else negated.inputs[0], "Slice")
    first = _producer(concat.inputs[1], "Slice")
    if first is None or second is None or x.shape is None or not isinstance(x.shape[3], int):
        return False
    half, size = x.shape[3] // 2, x.shape[3]
    return _is_slice(first, x, 0, half, half) and _is_slice(second, x, half, size, size)


def _is_slice(node: ir.Node, x: ir.Value, start: int, end: int, least_end: int) -> bool:
    """Return whether a node is ``x[..., start:end]``; a larger end than ``least_end`` means the whole rest."""
    numbers = [_number(value) for value in node.inputs[1:]]
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
    unsqueeze = _producer(value, "Unsqueeze")
    if unsqueeze is None or _number(unsqueeze.inputs[1]) != 1:
        return None
    source = unsqueeze.inputs[0]
    cast = _producer(source, "Cast")
    function = _producer(source if cast is None else cast.inputs[0], op_type)
    concat = _producer(None if function is None else function.inputs[0], "Concat")
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
        nodes = [ir.node(op_type, [angles], name=key)]
        nodes.append(ir.node("Cast", nodes[0].outputs, {"to": x.dtype}, name=f"{key}.cast"))
        for node, dtype in zip(nodes, (angles.dtype, x.dtype), strict=True):
            output = node.outputs[0]
            output.name, output.shape = node.name, angles.shape
            output.type = None if dtype is None else ir.TensorType(dtype)
        graph.insert_before(unsqueeze, nodes)
        halves[key] = nodes[-1].outputs[0]
    return halves[key]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value if it is of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _number(value: ir.Value | None) -> int | None:
    """Return the only element of a constant."""
    constant = None if value is None else value.const_value
    return int(constant.numpy().item()) if constant is not None and constant.size == 1 else None
