"""The numpy reference of single operators, fed with the constants of an exported file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from rankbook.exporter.file import Node

    Array = np.ndarray[Any, Any]


def constants(node: Node) -> dict[str, Array]:
    """Return the stored tensors that a node reads, by the formal names of their ports."""
    return {formal: tensor.numpy() for formal, tensor in node.constants.items()}


def run_node(node: Node, values: dict[str, Array]) -> dict[str, Array]:
    """Compute the outputs of one node from all of its inputs, by the formal names of their ports.

    Raises:
        ValueError: There is no such operator.
    """
    operator = node.operator
    if operator is None:
        raise ValueError(f"there is no operator {node.op_type}")
    results = operator.compute([values[formal] for formal in node.ports()], node.attributes)
    return dict(zip((port.name for port in operator.outputs), results, strict=True))
