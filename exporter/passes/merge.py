"""Makes one node of products that have the same input, see `rankbook.plugins.merged`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from rankbook.exporter.rewrite import Writer, lazy_tensor, take_over
from rankbook.plugins import contract, merged
from rankbook.plugins.contract import Operator
from rankbook.plugins.operators import OPERATORS


class MergeProducts(ir.passes.InPlacePass):
    """Merges packed layers of one x, one operator and one group size: query, key and value; gate and up.

    Layers of different widths, or of which some have an error branch, get nodes of their own, of one product. What
    stays as it is: layers that share constants with another node (an output layer tied to the embedding), and those
    whose group parameters or factors are not stored in 8 bits.
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
        operator = _operator(node)
        if operator is None or merged.name_of(operator, 1) not in OPERATORS:
            continue
        ports = _ports(node, operator)
        if not all(value.is_initializer() and len(value.uses()) == 1 for value in ports.values()):
            continue
        if all(_full(ports[port]) for port in merged.parts(operator)):
            groups = _sizes(ports["params"])[1]
            found.setdefault((id(node.inputs[0]), node.op_type, groups), []).append(node)
    for nodes in found.values():
        for first in range(0, len(nodes), merged.MOST):
            yield nodes[first : first + merged.MOST]


def _operator(node: ir.Node) -> Operator | None:
    return OPERATORS.get(node.op_type) if node.domain == contract.DOMAIN else None


def _ports(node: ir.Node, operator: Operator) -> dict[str, ir.Value]:
    """Return the constants of a node by formal name."""
    constants = [value for value in node.inputs[1:] if value is not None]
    return dict(zip(operator.constants(), constants, strict=False))


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return () if value.shape is None else tuple(value.shape.numpy())


def _full(value: ir.Value) -> bool:
    """Return whether a part holds the numbers themselves, and not a single 1 because they are stored as floats."""
    return math.prod(_sizes(value)) > 1


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    member = OPERATORS[nodes[0].op_type]
    operator = OPERATORS[merged.name_of(member, len(nodes))]
    ports = [_ports(node, member) for node in nodes]
    products = [_product(node, values) for node, values in zip(nodes, ports, strict=True)]
    packed, layout = merged.pack(member, products)
    writer = Writer(graph, merged.JOINT.join(str(node.name) for node in nodes))
    parts = [(products[i].constants[name], part) for i, name, part in layout]
    data = writer.constant(_data(f"{nodes[0].name}.{merged.DATA}", parts))
    results = writer.node(
        operator.name,
        [nodes[0].inputs[0], data],
        packed,
        domain=contract.DOMAIN,
        name=writer.prefix,
        outputs=len(nodes),
    ).outputs
    graph.insert_before(nodes[0], writer.nodes)
    for node, result in zip(nodes, results, strict=True):
        take_over(node.outputs[0], result)
    graph.remove(nodes, safe=True)
    for values in ports:
        for value in values.values():
            del graph.initializers[str(value.name)]


def _product(node: ir.Node, ports: Mapping[str, ir.Value]) -> merged.Product:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return merged.Product(attributes, {name: _tensor(value) for name, value in ports.items()})


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ValueError(f"initializer {value.name} has no value")
    return value.const_value


def _data(name: str, parts: Sequence[tuple[ir.TensorProtocol, merged.Part]]) -> ir.LazyTensor:
    """Return the tensor that holds the parts; they are read when the file is written."""
    size = parts[-1][1].end

    def load() -> Tensor:
        out = torch.zeros(size, dtype=torch.int8)
        for tensor, place in parts:
            out.numpy()[place.start : place.end] = tensor.numpy().reshape(-1)
        return out

    return lazy_tensor(name, ir.DataType.INT8, [size], load)
