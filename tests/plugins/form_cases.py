"""Operators whose constants have every combination of the shapes and types that each may have alone.

Few combinations are a layer (`rankbook.plugins.forms`); the others must be refused by every runtime, with a sentence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rankbook.plugins import forms
from tests.ops.cases import Array, Case, Op

CASE = Case(bits=4, in_features=96, group=48, rank=3, bias=True, tokens=(3,))
"""All letters differ, so that no shape is another's by chance."""


@dataclass(frozen=True)
class Combination:
    """Constants of one part of a layer, each in one of its forms.

    Attributes:
        parts: Form of each constant.
        legal: Whether they are a form of the part together.
    """

    parts: Mapping[str, forms.PartForm]
    legal: bool

    def __str__(self) -> str:
        return ", ".join(f"{name} {forms.spell(part)}" for name, part in self.parts.items()).replace("'", "")

    def op(self) -> Op:
        """Return an operator that has them."""
        op = CASE.draw()
        rng = np.random.default_rng(0)
        op.inputs |= {name: fill(part, sizes_of(op), rng) for name, part in self.parts.items()}
        return op


def sizes_of(op: Op) -> dict[str, int]:
    """Return the letters of a drawn operator."""
    panels, blocks, bits, _, _ = op.inputs["codes"].shape
    groups = max(op.inputs["params"].shape[1], op.inputs["step"].shape[1])
    rank = op.inputs["up_scale"].shape[-1] if "up_scale" in op.inputs else 0
    sizes = {"N": op.attributes["out_features"], "K": op.attributes["in_features"], "NP": panels, "KB": blocks}
    planes = op.inputs["levels"].shape[0]
    return sizes | {"b": bits, "L": 1 << bits, "G": groups, "Q": planes, "R": rank}


def fill(part: forms.PartForm, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    """Return random elements, or those of a placeholder."""
    spec = part.sized(sizes)
    if spec.value is not None:
        return np.full(spec.shape, spec.value, spec.dtype)
    if spec.dtype == "int8":
        return rng.integers(-128, 128, spec.shape).astype(np.int8)
    return (rng.standard_normal(spec.shape) * 1e-3).astype(spec.dtype)


def combinations() -> Iterator[Combination]:
    """Return every combination within the group parameters, and within the error branch."""
    for table in (forms.PARAMS, forms.FACTORS):
        names = list(table[forms.Form.INT8])
        legal = [dict(parts) for parts in table.values()]
        for chosen in itertools.product(*(forms.CONSTANTS[name] for name in names)):
            parts = dict(zip(names, chosen, strict=True))
            yield Combination(parts, parts in legal)


COMBINATIONS: Sequence[Combination] = tuple(combinations())


def typed(name: str, dtype: str) -> Op:
    """Return an operator that has one constant in another type, where all others are int8 with scales."""
    op = CASE.draw()
    op.inputs[name] = op.inputs[name].astype(dtype)
    return op


def poisoned(name: str, bits: int, value: float) -> Op:
    """Return an operator whose constant ``name`` has one element that is not finite."""
    op = CASE.draw(param_bits=bits, factor_bits=bits)
    tensor = op.inputs[name].copy()
    tensor.reshape(-1)[tensor.size // 2] = value
    op.inputs[name] = tensor
    return op


def with_groups(op: Op, groups: int) -> Op:
    """Return the operator with another number of groups, all with the parameters of the first."""
    op.inputs["params"] = np.repeat(op.inputs["params"][:, :1], groups, axis=1)
    return op


def with_planes(op: Op, planes: int, offset: int) -> Op:
    """Return the operator with another number of parameter planes, all with the levels of the last."""
    for name, axis in (("levels", 0), ("params", 2), ("step", 2), ("base", 2)):
        last = np.take(op.inputs[name], [-1], axis=axis)
        op.inputs[name] = np.repeat(last, planes, axis=axis)
    op.attributes["offset"] = offset
    return op
