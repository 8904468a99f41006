"""The bodies of our operators on rows: ONNX Runtime's own nodes, for sessions without our library."""

from __future__ import annotations

import onnx
from onnx import helper

from rankbook.exporter.functions import OPSET
from rankbook.plugins import attention_contract, contract, row_contract

_STOCK = attention_contract.STOCK_DOMAIN


def row_function(name: str) -> onnx.FunctionProto:
    """Return the body of one of `row_contract.OPERATORS`.

    Raises:
        KeyError: There is no such operator.
    """
    operator = row_contract.OPERATORS[name]
    nodes = _add_norm() if operator is row_contract.ADD_NORM else _swiglu()
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_STOCK, 1)]
    return helper.make_function(
        contract.DOMAIN, name, [*operator.inputs], [*operator.outputs], nodes, opsets, attributes=[*operator.floats]
    )


def _add_norm() -> list[onnx.NodeProto]:
    outputs = ["y", "", "", "sum"]
    node = helper.make_node("SkipSimplifiedLayerNormalization", ["a", "b", "scale"], outputs, domain=_STOCK)
    node.attribute.add(name="epsilon", type=onnx.AttributeProto.FLOAT, ref_attr_name="epsilon")
    return [node]


def _swiglu() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Sigmoid", ["gate"], ["share"]),
        helper.make_node("Mul", ["gate", "share"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["y"]),
    ]
