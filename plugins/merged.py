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
from dataclasses import dataclass, replace
from typing import Any

from rankbook.plugins import contract
from rankbook.plugins.contract import Array, Attribute, Operator, Port

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
        start: First byte.
        shape: Sizes; an element is a byte.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.start + math.prod(self.shape)

    def of(self, data: Array) -> Array:
        """Return the constant as a view of the tensor of its node."""
        return data[self.start : self.end].reshape(self.shape)


@dataclass(frozen=True)
class Product:
    """One product of a node: what it has alone.

    Attributes:
        attributes: By name.
        constants: By formal name; as tensors, or where they lie in the tensor of the node.
    """

    attributes: Mapping[str, Any]
    constants: Mapping[str, Any]


def name_of(operator: Operator, count: int) -> str:
    """Return the op_type of several products of one operator."""
    return f"{operator.name}{SUFFIX}{count}"


def parts(member: Operator) -> tuple[str, ...]:
    """Return the constants of a product that lie in the tensor, in their order there."""
    return tuple(name for name in PARTS if name in member.constants())


def pack(member: Operator, products: Sequence[Product]) -> tuple[dict[str, Any], list[tuple[int, str, Part]]]:
    """Return the attributes of the node of several products, and what its tensor holds.

    Args:
        member: The operator of each.
        products: With tensors as constants; those of `PARTS` have a ``shape``, others become attributes as they are.

    Returns:
        Attributes by name, and (product, formal name, place) of every part in their order in the tensor.
    """
    attributes: dict[str, Any] = {}
    layout: list[tuple[int, str, Part]] = []
    end = 0
    for port in parts(member):
        for i, product in enumerate(products):
            part = Part(-(-end // ALIGNMENT) * ALIGNMENT, tuple(product.constants[port].shape))
            attributes[f"{port}_{i}"] = [part.start, *part.shape]
            layout.append((i, port, part))
            end = part.end
    for i, product in enumerate(products):
        attributes |= {f"{name}_{i}": product.attributes[name] for name in _integers(member)}
        small = (name for name in member.constants() if name not in PARTS)
        attributes |= {f"{name}_{i}": product.constants[name] for name in small}
    return attributes, layout


def unpack(operator: Operator, attributes: Mapping[str, Any]) -> tuple[Product, ...]:
    """Return the products of a node of several.

    Raises:
        ValueError: An attribute is missing or impossible; the message says which.
    """
    if missing := [item.name for item in operator.attributes if item.name not in attributes]:
        raise ValueError(f"lacks the attributes {', '.join(missing)}")
    member = operator.member or operator
    return tuple(_product(member, attributes, i) for i in range(operator.count))


def _product(member: Operator, attributes: Mapping[str, Any], i: int) -> Product:
    own = {
        item.name: item.value if item.kind == "string" else attributes[f"{item.name}_{i}"] for item in member.attributes
    }
    constants = {name: attributes[f"{name}_{i}"] for name in member.constants()}
    for name in parts(member):
        place = constants[name]
        sizes = list(place) if isinstance(place, Sequence) else []
        if len(sizes) < 2 or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"attribute {name}_{i} is {place!r:.80}; it must be a first byte and a shape")
        constants[name] = Part(sizes[0], tuple(sizes[1:]))
    return Product(own, constants)


def _integers(member: Operator) -> tuple[str, ...]:
    return tuple(item.name for item in member.attributes if item.kind == "int")


def _attributes(member: Operator, i: int) -> Iterator[Attribute]:
    for item in member.attributes:
        if item.kind == "int":
            yield replace(item, name=f"{item.name}_{i}")
    for port in member.inputs:
        if port.constant:
            kind, doc = ("ints", f"first byte and shape of {port.name}") if port.name in PARTS else ("tensor", port.doc)
            yield Attribute(f"{port.name}_{i}", kind, doc)


def _merged(member: Operator, count: int) -> Operator:
    def compute(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
        x, data = inputs[member.inputs[0].name], inputs[DATA]
        results: list[Array] = []
        for product in unpack(operator, attributes):
            held = {name: at.of(data) if isinstance(at, Part) else at for name, at in product.constants.items()}
            results += member.compute([x, *held.values()], product.attributes)
        return tuple(results)

    (y,) = member.outputs
    operator = Operator(
        name_of(member, count),
        f"{member.kind}{SUFFIX}",
        (member.inputs[0], Port(DATA, (("D",),), ("int8",), True, "constants of all products")),
        tuple(replace(y, name=f"{y.name}_{i}") for i in range(count)),
        tuple(item for i in range(count) for item in _attributes(member, i)),
        compute,
        "merged",
        member.bits,
        member=member,
        count=count,
    )
    return operator


OPERATORS = tuple(
    _merged(member, count)
    for member in contract.PACKED.values()
    if member.kind != contract.GATHER
    for count in range(1, MOST + 1)
)
"""The operators of this module."""
