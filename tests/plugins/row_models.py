"""Models of one node that works on rows, with its body."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from rankbook.exporter.bodies import body
from rankbook.plugins import contract
from rankbook.plugins.operators import OPERATORS

Floats = npt.NDArray[np.float32]
EPSILON = 1e-5


def model_of(name: str, scale: Floats) -> onnx.ModelProto:
    """Return a model of one node with its body."""
    operator = OPERATORS[name]
    inputs, outputs = operator.input_names(), [port.name for port in operator.outputs]
    attributes: dict[str, Any] = {item.name: EPSILON for item in operator.attributes}
    node = helper.make_node(name, inputs, outputs, name="layer", domain=contract.DOMAIN, **attributes)
    constants = [numpy_helper.from_array(scale, "scale")] if "scale" in inputs else []
    fed = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in inputs if key != "scale"]
    given = [helper.make_tensor_value_info(key, TensorProto.FLOAT, None) for key in outputs]
    graph = helper.make_graph([node], "op", fed, given, constants)
    opsets = [
        helper.make_opsetid("", 23),
        helper.make_opsetid(contract.DOMAIN, 1),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, functions=[body(name)], ir_version=11)
