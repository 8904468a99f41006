"""The bodies that are one node of ONNX Runtime's own, for sessions without the native library."""

from __future__ import annotations

import onnx

from rankbook.exporter.functions import FunctionWriter, forwarded
from rankbook.plugins.contract import STOCK_DOMAIN, Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function.

    Where a node ends before the last inputs of the operator, ONNX Runtime leaves them out of the inner node too.

    Raises:
        ValueError: ONNX Runtime has no operator for it.
    """
    if operator.stock is None:
        raise ValueError(f"{operator.name} is no operator of ONNX Runtime")
    writer, outputs = FunctionWriter(), [""] * (operator.stock.places[-1] + 1)
    for port, place in zip(operator.outputs, operator.stock.places, strict=True):
        outputs[place] = port.name
    attributes = [forwarded(item, item.name) for item in operator.attributes]
    writer.call(STOCK_DOMAIN, operator.stock.name, operator.input_names(), outputs, attributes)
    return writer.function(operator)
