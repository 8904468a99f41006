"""The body of the attention operator: ONNX Runtime's own node, for sessions without the native library."""

from __future__ import annotations

import onnx

from rankbook.exporter.functions import FunctionWriter, forwarded
from rankbook.plugins import attention
from rankbook.plugins.contract import Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function: one ``com.microsoft::GroupQueryAttention`` with the same ports and attributes.

    Where a node ends before the inputs of the rotary embedding, ONNX Runtime leaves them out of the inner node too.
    """
    writer = FunctionWriter()
    outputs = [port.name for port in operator.outputs]
    attributes = [forwarded(item, item.name) for item in operator.attributes]
    writer.call(attention.STOCK_DOMAIN, attention.NAME, operator.input_names(), outputs, attributes)
    return writer.function(operator)
