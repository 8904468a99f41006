"""Bodies of the operators in standard ONNX, so that any runtime can compute them: one module a kind.

An operator names its module (`rankbook.plugins.contract.Operator`), whose ``body`` returns the function.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache

import onnx

from rankbook.exporter.bodies import experts
from rankbook.exporter.functions import DEQUANTIZE, dequantize_function, nodes_within
from rankbook.plugins import contract
from rankbook.plugins.operators import OPERATORS


def functions(op_types: Iterable[str]) -> list[onnx.FunctionProto]:
    """Return the functions that a file with these operators needs, with those that they call, each once.

    Raises:
        KeyError: There is no such operator.
    """
    wanted, found = sorted(set(op_types)), dict[str, onnx.FunctionProto]()
    while wanted:
        name = wanted.pop(0)
        if name not in found:
            found[name] = body(name)
            wanted += [node.op_type for node in nodes_within(found[name].node) if node.domain == contract.DOMAIN]
    return list(found.values())


@cache
def body(op_type: str) -> onnx.FunctionProto:
    """Return one function.

    Raises:
        KeyError: There is no such operator.
    """
    if op_type == DEQUANTIZE:
        return dequantize_function()
    if op_type.startswith(experts.PRODUCT):
        return experts.one(OPERATORS[op_type.removeprefix(experts.PRODUCT)])
    operator = OPERATORS[op_type]
    function: onnx.FunctionProto = importlib.import_module(f"{__name__}.{operator.body}").body(operator)
    return function
