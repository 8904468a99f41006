"""Up to which sizes a traced graph is right: what a model's code asked of the sizes of its inputs, and was told once.

``if length > 64`` takes one way while a model is traced, and the graph has that way alone. torch.export notes what was
answered as ranges of sizes and as conditions between them; nothing in an ONNX file checks either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import SymInt

Sizes = Mapping[str, int]
"""Sizes of dynamic axes by name."""


def broken(program: Any, axes: Sequence[Mapping[int, str]], texts: Sequence[Sizes]) -> str | None:
    """Return a condition of a traced program that a text does not keep, or None where all keep all.

    Args:
        program: A ``torch.export.ExportedProgram``.
        axes: Names of the dynamic axes of each of its inputs.
        texts: Sizes of the longest texts that the program has to be right for.
    """
    import sympy

    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    sizes = [
        (sympy.Symbol(name, integer=True), _expression(value.shape[axis]))
        for value, dynamic in zip(values, axes, strict=True)
        for axis, name in dynamic.items()
    ]
    # An axis has a symbol of its own, unless the code has tied it to another one or to a number.
    names = {size: name for name, size in reversed(sizes) if size.is_Symbol}
    conditions = [*(sympy.Eq(name, size) for name, size in sizes), *_conditions(program, values)]
    named = [condition.subs(names) for condition in conditions]
    for text in texts:
        known = {name: text[name.name] for name, _ in sizes}
        for condition in named:
            if condition.subs(known) == sympy.false:  # others are kept, or need sizes of values inside
                return str(condition)
    return None


def _expression(size: int | SymInt) -> Any:
    import sympy

    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(size)


def _conditions(program: Any, values: Sequence[Any]) -> Iterator[Any]:
    """Yield what torch.export has noted, with symbols of sizes."""
    for symbol, span in program.range_constraints.items():
        yield (symbol >= span.lower) & (symbol <= span.upper)
    environments = {id(value.fake_mode.shape_env): value.fake_mode.shape_env for value in values}
    for environment in environments.values():
        for found in environment.deferred_runtime_asserts.values():
            yield from (noted.expr for noted in found)
