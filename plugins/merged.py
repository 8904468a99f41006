"""Operators that are one to three products of one x, such as query, key and value, or gate and up.

``CodebookMatMul4Merged3`` is three times ``CodebookMatMul4`` with two inputs: x, and the INT8 constants of all
products, one after another in one tensor. Where each lies there, and its shape, is an attribute; the small constants
are attributes too. Ports and attributes have the names that they have alone, with ``_0``, ``_1`` or ``_2`` behind them;
there are as many outputs as products. The node's name is the names of the layers, joined by `JOINT`.

Why: x is read, rounded and handed to the threads once, which is much of what a small product costs in a decode step;
and ONNX Runtime touches every initializer of a graph at each step, whoever needs it (0.15 to 0.2 us on an AMD Zen 5:
SmolLM2-135M had 1334, and a step got 4 % shorter when 833 of them were shared), and keeps some KB about each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankbook.plugins import contract

SUFFIX = "Merged"
"""Stands in the name of an operator before the number of its products."""
MOST = 3
"""Products that one operator can hold."""
JOINT = " "
"""Between the names of the layers in the name of a node."""
PARTS = ("down", "params", "up", "codes")
"""Constants that lie in the tensor ``data``: those of the first kind of all products, then those of the second."""
DATA = "data"
"""Formal name of that tensor, and the end of its name in a file."""
ALIGNMENT = 64
"""Every part begins at a multiple of so many bytes."""


@dataclass(frozen=True)
class Part:
    """Where a constant lies in the tensor of a node, in bytes, and its shape.

    Attributes:
        data: Name of the tensor.
        start: First byte.
        shape: Sizes; an element is a byte.
    """

    data: str
    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class MergedContract:
    """One operator of several products.

    Attributes:
        member: What each product is alone.
        count: How many there are, 1 to `MOST`.
    """

    member: contract.OpContract
    count: int

    @property
    def name(self) -> str:
        """The op_type."""
        return f"{self.member.name}{SUFFIX}{self.count}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The activations and the tensor of the constants."""
        return (self.member.inputs[0].name, DATA)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The product of each layer."""
        return tuple(f"{self.member.outputs[0].name}_{i}" for i in range(self.count))

    @property
    def parts(self) -> tuple[str, ...]:
        """Constants of a product that lie in the tensor, in their order there."""
        return tuple(name for name in PARTS if name in self.member.constants())

    @property
    def integers(self) -> tuple[str, ...]:
        """Attributes of a product that are integers."""
        return tuple(item.name for item in self.member.attributes if item.kind == "int")

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes: integers, places of parts (``[start, *shape]``), tensors."""
        names = (*self.integers, *self.member.constants())
        return tuple(f"{name}_{i}" for i in range(self.count) for name in names)


OPERATORS: dict[str, MergedContract] = {
    merged.name: merged
    for member in contract.OPERATORS.values()
    if member.kind != contract.GATHER
    for merged in (MergedContract(member, count) for count in range(1, MOST + 1))
}
"""Every such operator by its op_type."""


@dataclass(frozen=True)
class Node:
    """A node of our domain as its parts.

    Attributes:
        name: Its name.
        op_type: Its operator.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        attributes: By name.
        constants: Of a product that was taken out of a node: inputs that the file does not hold under their name, as a
            `Part` or as the tensor itself.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)


def merge(nodes: Sequence[Node], constants: Mapping[str, Any]) -> tuple[Node, list[tuple[str, Part]]]:
    """Return the node that computes several, which have one op_type and one x, and what its tensor holds.

    Args:
        nodes: Products alone.
        constants: Their constants by name; those of `PARTS` have a ``shape``, others become attributes as they are.

    Returns:
        The node, and name and place of every part in their order.

    Raises:
        KeyError: There is no operator for so many of them.
    """
    op_type = nodes[0].op_type
    merged = OPERATORS[f"{op_type}{SUFFIX}{len(nodes)}"]
    data = f"{nodes[0].name}.{DATA}"
    named = [dict(zip(merged.member.constants(), node.inputs[1:], strict=True)) for node in nodes]
    attributes: dict[str, Any] = {}
    layout: list[tuple[str, Part]] = []
    end = 0
    for port in merged.parts:
        for i, names in enumerate(named):
            part = Part(data, -(-end // ALIGNMENT) * ALIGNMENT, tuple(constants[names[port]].shape))
            attributes[f"{port}_{i}"] = [part.start, *part.shape]
            layout.append((names[port], part))
            end = part.end
    for i, (node, names) in enumerate(zip(nodes, named, strict=True)):
        attributes |= {f"{name}_{i}": node.attributes[name] for name in merged.integers}
        attributes |= {f"{port}_{i}": constants[name] for port, name in names.items() if port not in merged.parts}
    outputs = tuple(node.outputs[0] for node in nodes)
    name = JOINT.join(node.name for node in nodes)
    return Node(name, merged.name, (nodes[0].inputs[0], data), outputs, attributes), layout


def split(node: Node) -> tuple[Node, ...]:
    """Return the nodes that one of `OPERATORS` stands for; any other is returned alone.

    A constant has the name of its layer with its formal name behind it.

    Raises:
        ValueError: It has the wrong number of names, inputs or outputs, lacks an attribute, or says something
            impossible about where constants lie; the message says which.
    """
    merged = OPERATORS.get(node.op_type)
    if merged is None:
        return (node,)
    names = node.name.split(JOINT)
    if (len(names), len(node.outputs), len(node.inputs)) != (merged.count, merged.count, 2):
        raise ValueError(
            f"has {len(names)} names, {len(node.outputs)} outputs and {len(node.inputs)} inputs; it must have"
            f" {merged.count}, {merged.count} and 2"
        )
    if missing := [name for name in merged.attributes if name not in node.attributes]:
        raise ValueError(f"lacks the attributes {', '.join(missing)}")
    return tuple(_product(merged, node, i, layer) for i, layer in enumerate(names))


def _product(merged: MergedContract, node: Node, i: int, layer: str) -> Node:
    constants = {f"{layer}.{port}": value for port, value in _constants(merged, node, i)}
    attributes = {
        item.name: item.value if item.kind == "string" else node.attributes[f"{item.name}_{i}"]
        for item in merged.member.attributes
    }
    inputs = (node.inputs[0], *constants)
    return Node(layer, merged.member.name, inputs, (node.outputs[i],), attributes, constants)


def _constants(merged: MergedContract, node: Node, i: int) -> Iterator[tuple[str, Any]]:
    for port in merged.member.constants():
        value = node.attributes[f"{port}_{i}"]
        if port in merged.parts:
            sizes = list(value) if isinstance(value, Sequence) else []
            if len(sizes) < 2 or not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise ValueError(f"attribute {port}_{i} is {value!r}; it must be a first byte and a shape")
            yield port, Part(node.inputs[1], sizes[0], tuple(sizes[1:]))
        else:
            yield port, value
