"""The body of a sum with its normalization: ONNX Runtime's own node, for sessions without the native library."""

from __future__ import annotations

import onnx

from rankbook.exporter.functions import FunctionWriter, forwarded
from rankbook.plugins.attention import STOCK_DOMAIN
from rankbook.plugins.contract import Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function: one ``com.microsoft::SkipSimplifiedLayerNormalization``."""
    writer = FunctionWriter()
    y, total = (port.name for port in operator.outputs)
    attributes = [forwarded(item, item.name) for item in operator.attributes]
    writer.call(
        STOCK_DOMAIN, "SkipSimplifiedLayerNormalization", operator.input_names(), [y, "", "", total], attributes
    )
    return writer.function(operator)
