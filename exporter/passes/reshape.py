"""Gives reshapes a constant target where the shapes of input and output allow it."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.rewrite import NodePass, Writer


class StaticReshape(NodePass):
    """Replaces the computed target of a Reshape by a constant.

    * An output size that is a number is written as that number: torch leaves one of them to be inferred, often the
      number of heads, which TensorRT then does not know when it checks an attention or rotary embedding.
    * A dynamic size that the input has on the same axis is copied (0); one other dynamic size may be inferred (-1).

    Reshapes with more than one size of the last kind stay.
    """

    kind = "Reshape"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Give a node its target."""
        if (target := _target(node)) is None:
            return False
        node.replace_input_with(1, Writer(graph, "").ints(*target))
        node.attributes.pop("allowzero", None)  # 0 now means the size of the input
        return True


def _target(node: ir.Node) -> list[int] | None:
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None or node.inputs[1] is None:
        return None
    if node.inputs[1].const_value is not None:
        return None
    target = []
    for axis, size in enumerate(result.shape):
        if isinstance(size, int):
            target.append(size)
        elif size.value is None:
            return None
        else:
            target.append(0 if axis < len(source.shape) and source.shape[axis] == size else -1)
    return target if target.count(-1) <= 1 and 0 not in list(result.shape) else None
