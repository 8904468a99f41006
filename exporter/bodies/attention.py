"""The body of our attention operator: ONNX Runtime's own node, for sessions without our library."""

from __future__ import annotations

import onnx
from onnx import helper

from rankbook.exporter.functions import OPSET
from rankbook.plugins import attention_contract, contract


def attention_function() -> onnx.FunctionProto:
    """Return ``rankbook::GroupQueryAttention`` as one ``com.microsoft::GroupQueryAttention`` with the same attributes.

    The rotary inputs are optional: where a node ends before them they are left out of the inner node too.
    """
    inputs = [*attention_contract.INPUTS, *attention_contract.ROTARY_INPUTS]
    outputs = [*attention_contract.OUTPUTS]
    node = helper.make_node(attention_contract.NAME, inputs, outputs, domain=attention_contract.STOCK_DOMAIN)
    kinds = dict.fromkeys(attention_contract.INT_ATTRIBUTES, onnx.AttributeProto.INT)
    kinds |= dict.fromkeys(attention_contract.FLOAT_ATTRIBUTES, onnx.AttributeProto.FLOAT)
    node.attribute.extend(onnx.AttributeProto(name=name, type=kind, ref_attr_name=name) for name, kind in kinds.items())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(attention_contract.STOCK_DOMAIN, 1)]
    return helper.make_function(
        contract.DOMAIN, attention_contract.NAME, inputs, outputs, [node], opsets, attributes=list(kinds)
    )
