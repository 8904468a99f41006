"""Operators of several products, drawn and written as one node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rankbook.exporter.bodies import functions
from rankbook.plugins import contract, merged
from rankbook.plugins.merged import Product
from rankbook.plugins.operators import OPERATORS
from tests.ops.cases import Case, Op

SIZES = (77, 32, 100)
"""Rows of the products; two of them end inside a panel."""


def draw_several(case: Case, count: int) -> list[Op]:
    """Draw products of one x."""
    ops = [case.draw(out_features=SIZES[i], seed=case.seed + i) for i in range(count)]
    return [op.with_x(ops[0].x) for op in ops]


def merge(ops: list[Op]) -> tuple[dict[str, Any], Any]:
    """Return the attributes of the node of several products, and the tensor that it reads."""
    products = [Product(op.attributes, op.constants()) for op in ops]
    attributes, layout = merged.pack(ops[0].contract, products)
    data = np.zeros(layout[-1][2].end, np.int8)
    for i, name, part in layout:
        data[part.start : part.end] = ops[i].inputs[name].reshape(-1)
    return attributes, data


def operator_of(ops: list[Op]) -> contract.Operator:
    """Return the operator that computes all of them."""
    return OPERATORS[merged.name_of(ops[0].contract, len(ops))]


def model_of(ops: list[Op], *, bodies: bool = False) -> onnx.ModelProto:
    """Return a model whose only node computes all of them."""
    operator, (attributes, data) = operator_of(ops), merge(ops)
    tensors = {
        name: numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in attributes.items()
    }
    outputs = [f"y.{i}" for i in range(len(ops))]
    name = merged.JOINT.join(f"layer.{i}" for i in range(len(ops)))
    node = helper.make_node(operator.name, ["x", "layer.0.data"], outputs, name, domain=contract.DOMAIN, **tensors)
    feed = ops[0].x
    kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
    x = helper.make_tensor_value_info("x", kind, [f"d{i}" for i in range(feed.ndim - 1)] + [None])
    values = [helper.make_tensor_value_info(output, kind, None) for output in outputs]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    graph = helper.make_graph([node], "op", [x], values, [numpy_helper.from_array(data, "layer.0.data")])
    held = functions([operator.name]) if bodies else []
    return helper.make_model(graph, opset_imports=opsets, functions=held, ir_version=11)
