"""The bodies of attention with a cache in float16: Casts around ONNX Runtime's own node."""

from __future__ import annotations

import onnx

from rankbook.exporter.functions import FunctionWriter, forwarded
from rankbook.plugins import attention
from rankbook.plugins.contract import STOCK_DOMAIN, Operator


def body(operator: Operator) -> onnx.FunctionProto:
    """Return the function: new keys are turned and rounded before that node, whose cache is float32.

    The past is made as long as the present, because ONNX Runtime gives a value that nobody else reads to the node to
    write the present into, and takes both for equally long.
    """
    writer = FunctionWriter()
    names = list(operator.input_names())
    if "cos" in names:
        for name, heads in (("query", "num_heads"), ("key", "kv_num_heads")):
            turned = f"{name}_turned"
            count = onnx.AttributeProto(name="num_heads", type=onnx.AttributeProto.INT, ref_attr_name=heads)
            writer.call("", "RotaryEmbedding", [name, "cos", "sin", "position_ids"], [turned], [count])
            names[names.index(name)] = turned
        names = names[: names.index("cos")]
    total = writer.node("Cast", "total_sequence_length", to=onnx.TensorProto.INT64)
    missing = writer.node("Max", writer.node("Sub", total, writer.size("past_key", 2)), writer.ints([0]))
    longer = writer.node("Concat", writer.ints([0] * 6), missing, writer.ints([0]), axis=0)
    for place, name in enumerate(names):
        if name.startswith(("key", "value")):
            names[place] = _wide(writer, writer.node("Cast", name, to=onnx.TensorProto.FLOAT16))
        elif name.startswith("past"):
            names[place] = writer.node("Pad", _wide(writer, name), longer)
    result, *presents = (port.name for port in operator.outputs)
    wide = [f"{name}_wide" for name in presents]
    outside = onnx.helper.make_attribute(attention.ROTARY, 0)
    attributes = [*(forwarded(item, item.name) for item in operator.attributes), outside]
    writer.call(STOCK_DOMAIN, attention.NAME, names, [result, *wide], attributes)
    for name, present in zip(wide, presents, strict=True):
        writer.node("Cast", name, output=present, to=onnx.TensorProto.FLOAT16)  # exact: it was rounded before
    return writer.function(operator)


def _wide(writer: FunctionWriter, name: str) -> str:
    return writer.node("Cast", name, to=onnx.TensorProto.FLOAT)
