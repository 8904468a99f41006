"""Products of experts: each row of x times the matrix of the expert that was chosen for it.

``CodebookExperts4`` is ``CodebookMatMul4`` with one more input, the number of the expert of each row, and constants of
all experts: those of one matrix each, stacked along an axis in front. Tokens that several experts were chosen for come
as several rows. What lies between the matrices of an expert, gates and the sum over the chosen ones, stays in standard
operators, so that every family uses the same ones. (GShard, Lepikhin et al. 2020, and ggml's ``mul_mat_id``.)

Letters as in `rankbook.plugins.forms`; E is the number of experts and S that of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rankbook.plugins import contract
from rankbook.plugins.contract import Array, Operator, Port
from rankbook.plugins.forms import TensorSpec

NUMBERS = "experts"
"""Formal name of the input that says which expert a row belongs to."""
_PRODUCT, _EXPERTS = "MatMul", "Experts"


def name_of(member: Operator) -> str:
    """Return the op_type of the products of experts each of which is ``member``."""
    return member.name.replace(_PRODUCT, _EXPERTS)


def _experts(member: Operator) -> Operator:
    def compute(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
        x, numbers = inputs["x"], inputs[NUMBERS]
        y = np.zeros((len(x), int(attributes["out_features"])), x.dtype)
        for expert in np.unique(numbers):
            rows = numbers == expert
            constants = [inputs[name][int(expert)] for name in member.constants()]
            y[rows] = member.compute([x[rows], *constants], attributes)[0]
        return (y,)

    def check(attributes: Mapping[str, Any], constants: Mapping[str, TensorSpec]) -> str:
        try:
            operator.layer(attributes, constants)
        except ValueError as error:
            return str(error)
        return ""

    (x, *constants), (y,) = member.inputs, member.outputs
    stacked = [replace(port, shapes=tuple(("E", *shape) for shape in port.shapes)) for port in constants]
    numbers = Port(NUMBERS, (("S",),), ("int64",), False, "expert of each row, each in [0, E)")
    operator = replace(
        member,
        name=name_of(member),
        kind=member.kind.replace(_PRODUCT, _EXPERTS),
        inputs=(replace(x, shapes=(("S", "K"),)), numbers, *stacked),
        outputs=(replace(y, shapes=(("S", "N"),)),),
        reference=compute,
        body="experts",
        check=check,
        one_of=member,
    )
    return operator


OPERATORS = tuple(_experts(member) for member in contract.PACKED.values() if member.kind != contract.GATHER)
"""The operators of this module."""
