"""Operators that are several products of one x, such as query, key and value, or gate and up.

``CodebookMatMul4Merged3`` is three times ``CodebookMatMul4``: x, then the constants of the first product, of the second
and of the third; as many outputs. Ports and attributes have their own names with ``_0``, ``_1`` or ``_2`` behind them.
x is read, rounded and handed to the threads once, which is much of what a small product costs in a decode step. The
node's name is the names of the layers, joined by `JOINT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rankbook.plugins import contract

SUFFIX = "Merged"
"""Stands in the name of an operator before the number of its products."""
MOST = 3
"""Products that one operator can hold."""
JOINT = " "
"""Between the names of the layers in the name of a node."""


@dataclass(frozen=True)
class MergedContract:
    """One operator of several products.

    Attributes:
        member: What each product is alone.
        count: How many there are, 2 to `MOST`.
    """

    member: contract.OpContract
    count: int

    @property
    def name(self) -> str:
        """The op_type."""
        return f"{self.member.name}{SUFFIX}{self.count}"

    @property
    def inputs(self) -> tuple[contract.Port, ...]:
        """The activations and the constants of all products."""
        ports = [port for port in self.member.inputs if port.constant]
        return (
            self.member.inputs[0],
            *(replace(port, name=f"{port.name}_{i}") for i in range(self.count) for port in ports),
        )

    @property
    def outputs(self) -> tuple[contract.Port, ...]:
        """The product of each layer."""
        return tuple(replace(self.member.outputs[0], name=f"y_{i}") for i in range(self.count))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes, all of them integers."""
        names = [item.name for item in self.member.attributes if item.kind == "int"]
        return tuple(f"{name}_{i}" for i in range(self.count) for name in names)


OPERATORS: dict[str, MergedContract] = {
    merged.name: merged
    for member in contract.OPERATORS.values()
    if member.kind != contract.GATHER
    for merged in (MergedContract(member, count) for count in range(2, MOST + 1))
}
"""Every such operator by its op_type."""


@dataclass(frozen=True)
class Node:
    """A node of our domain as its parts."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


def merge(nodes: Sequence[Node]) -> Node:
    """Return the node that computes several, which have one op_type and one x.

    Raises:
        KeyError: There is no operator for so many of them.
    """
    merged = OPERATORS[f"{nodes[0].op_type}{SUFFIX}{len(nodes)}"]
    attributes = {
        f"{item.name}_{i}": node.attributes[item.name]
        for i, node in enumerate(nodes)
        for item in merged.member.attributes
        if item.kind == "int"
    }
    return Node(
        JOINT.join(node.name for node in nodes),
        merged.name,
        (nodes[0].inputs[0], *(name for node in nodes for name in node.inputs[1:])),
        tuple(node.outputs[0] for node in nodes),
        attributes,
    )


def split(node: Node) -> tuple[Node, ...]:
    """Return the nodes that one of `OPERATORS` stands for; any other is returned alone.

    Raises:
        ValueError: It has the wrong number of names, inputs, outputs, or lacks an attribute; the message says which.
    """
    merged = OPERATORS.get(node.op_type)
    if merged is None:
        return (node,)
    count, each = merged.count, len(merged.member.inputs) - 1
    names = node.name.split(JOINT)
    if (len(names), len(node.outputs), len(node.inputs)) != (count, count, 1 + count * each):
        raise ValueError(
            f"has {len(names)} names, {len(node.outputs)} outputs and {len(node.inputs)} inputs; it must have"
            f" {count}, {count} and {1 + count * each}"
        )
    if missing := [name for name in merged.attributes if name not in node.attributes]:
        raise ValueError(f"lacks the attributes {', '.join(missing)}")
    return tuple(
        Node(
            names[i],
            merged.member.name,
            (node.inputs[0], *node.inputs[1 + i * each : 1 + (i + 1) * each]),
            (node.outputs[i],),
            {
                item.name: item.value if item.kind == "string" else node.attributes[f"{item.name}_{i}"]
                for item in merged.member.attributes
            },
        )
        for i in range(count)
    )
