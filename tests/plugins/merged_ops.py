"""Operators of several products, drawn and written as one node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from rankbook.exporter.bodies.codebook import functions
from rankbook.plugins import contract, merged
from tests.ops.cases import Case, Op

SIZES = (77, 32, 100)
"""Rows of the products; two of them end inside a panel."""


def draw_several(case: Case, count: int) -> list[Op]:
    """Draw products of one x."""
    ops = [case.draw(out_features=SIZES[i], seed=case.seed + i) for i in range(count)]
    return [op.with_x(ops[0].x) for op in ops]


def node_of(op: Op, i: int) -> merged.Node:
    names = tuple("x" if name == "x" else f"layer.{i}.{name}" for name in op.inputs)
    return merged.Node(f"layer.{i}", op.op_type, names, (f"y.{i}",), op.attributes)


def merge(ops: list[Op]) -> tuple[merged.Node, Any]:
    """Return the node of several products, tensors among its attributes as protos, and the tensor that it reads."""
    constants = {f"layer.{i}.{name}": value for i, op in enumerate(ops) for name, value in op.inputs.items()}
    node, layout = merged.merge([node_of(op, i) for i, op in enumerate(ops)], constants)
    data = np.zeros(layout[-1][1].end, np.int8)
    for name, part in layout:
        data[part.start : part.end] = constants[name].reshape(-1)
    attributes = {
        name: numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in node.attributes.items()
    }
    return replace(node, attributes=attributes), data


def model_of(ops: list[Op], *, bodies: bool = False) -> onnx.ModelProto:
    """Return a model whose only node computes all of them."""
    parts, data = merge(ops)
    node = helper.make_node(
        parts.op_type, parts.inputs, parts.outputs, name=parts.name, domain=contract.DOMAIN, **parts.attributes
    )
    feed = ops[0].inputs["x"]
    kind = helper.np_dtype_to_tensor_dtype(feed.dtype)
    x = helper.make_tensor_value_info("x", kind, [f"d{i}" for i in range(feed.ndim - 1)] + [None])
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in parts.outputs]
    constants = [numpy_helper.from_array(data, parts.inputs[1])]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(contract.DOMAIN, contract.VERSION)]
    graph = helper.make_graph([node], "op", [x], outputs, constants)
    held = functions([parts.op_type]) if bodies else []
    return helper.make_model(graph, opset_imports=opsets, functions=held, ir_version=11)
