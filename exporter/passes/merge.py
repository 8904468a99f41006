"""Makes one node of products that have the same input, see `rankbook.plugins.merged`."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from rankbook.plugins import contract, merged


class MergeProducts(ir.passes.InPlacePass):
    """Merges products of one x in packed layers of one operator and one group size: query, key and value; gate and up.

    Layers of different widths, or of which some have an error branch, stay nodes of their own.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        together = list(_together(model.graph))
        for nodes in together:
            _merge(model.graph, nodes)
        return ir.passes.PassResult(model, modified=bool(together))


def _together(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Yield the nodes to be merged, in graph order."""
    found: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in graph:
        operator = contract.OPERATORS.get(node.op_type) if node.domain == contract.DOMAIN else None
        if operator is not None and operator.kind != contract.GATHER:
            found.setdefault((id(node.inputs[0]), node.op_type, _groups(node, operator)), []).append(node)
    for nodes in found.values():
        for first in range(0, len(nodes), merged.MOST):
            part = nodes[first : first + merged.MOST]
            if len(part) > 1:
                yield part


def _groups(node: ir.Node, operator: contract.OpContract) -> str:
    """Return the number of groups; params or step holds a number for each."""
    ports = dict(zip(operator.input_names(), node.inputs, strict=True))
    shapes = [value.shape for name in ("params", "step") if (value := ports[name]) and value.shape]
    return str(next((shape[1] for shape in shapes if shape[-1] != 1), None))


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    old = [node.outputs[0] for node in nodes]
    parts = merged.merge([_parts(node) for node in nodes])
    inputs = [nodes[0].inputs[0], *(value for node in nodes for value in node.inputs[1:])]
    attributes = {name: int(value) for name, value in parts.attributes.items()}
    node = ir.node(parts.op_type, inputs, attributes, num_outputs=len(old), domain=contract.DOMAIN, name=parts.name)
    graph.insert_before(nodes[0], [node])
    for new, replaced in zip(node.outputs, old, strict=True):
        new.name, new.type, new.shape = replaced.name, replaced.type, replaced.shape
        replaced.name = f"{replaced.name}.alone"
        ir.convenience.replace_all_uses_with(replaced, new, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)


def _parts(node: ir.Node) -> merged.Node:
    return merged.Node(
        str(node.name),
        node.op_type,
        tuple(str(value.name) for value in node.inputs if value is not None),
        tuple(str(value.name) for value in node.outputs),
        {name: attribute.value for name, attribute in node.attributes.items()},
    )
