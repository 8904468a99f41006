"""The body of the gate of a feed-forward layer."""

from __future__ import annotations

import onnx

from rankbook.exporter.functions import FunctionWriter
from rankbook.plugins.contract import Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function: gate * sigmoid(gate) * up."""
    writer = FunctionWriter()
    gate, up = operator.input_names()
    silu = writer.node("Mul", gate, writer.node("Sigmoid", gate))
    writer.node("Mul", silu, up, output=operator.outputs[0].name)
    return writer.function(operator)
