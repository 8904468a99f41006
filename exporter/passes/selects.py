"""The parts of a joint projection are taken by one node."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import NodePass, Writer, given, only_number, take_over


class SplitSelects(NodePass):
    """Makes one Split, and a Squeeze for each part, of Gathers that take every index of an axis of a value.

    torch takes query, key and value this way out of a joint projection (batch, length, heads, 3, size). The builder of
    TensorRT-RTX 1.7.1 crashes where normalizations follow such Gathers (Persimmon), and not behind a Split.
    """

    kind = "Gather"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Replace a Gather and its siblings."""
        if node.graph is None or (own := _place(node)) is None:  # gone with a sibling
            return False
        source, (axis, count, _) = given(node, 0), own
        places = [(user, _place(user)) for user in source.consumers() if user.graph is graph]
        parts = {place[2]: user for user, place in places if place is not None and place[:2] == own[:2]}
        if count < 2 or len(parts) != count:
            return False
        writer = Writer(graph, str(node.name))
        split = writer.node("Split", [source], {"axis": axis, "num_outputs": count}, outputs=count)
        made = [writer.op("Squeeze", part, writer.ints(axis)) for part in split.outputs]
        graph.insert_before(node, writer.nodes)
        for index, part in parts.items():
            take_over(part.outputs[0], made[index])
            graph.remove(part, safe=True)
        return True


def _place(node: ir.Node) -> tuple[int, int, int] | None:
    """Return axis, its fixed size, and the index that a Gather takes of it; None where it is no such Gather."""
    if node.domain or node.op_type != SplitSelects.kind:
        return None
    source, index = given(node, 0), given(node, 1)
    if (number := only_number(index)) is None or index.shape is None or len(index.shape) or source.shape is None:
        return None
    attribute = node.attributes.get("axis")
    axis = (attribute.as_int() if attribute else 0) % len(source.shape)
    size = source.shape[axis]
    return (axis, size, int(number) % size) if isinstance(size, int) else None
