"""Small graphs made from an exported file: one node on its own, or the whole file with more outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel, Node

Array = np.ndarray[Any, Any]
_ELEMENTS = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}


def single_node(model: ExportedModel, node: Node, constants: dict[str, Array], inputs: dict[str, Array]) -> bytes:
    """Return a serialized model with one node, its body and its constants.

    Args:
        model: The file that holds the body.
        node: The node; of a node of several products (`rankbook.plugins.merged`) one of them, alone.
        constants: Its initializers by formal name.
        inputs: Examples of its other inputs by formal name, for their types and ranks.
    """
    import onnx
    from onnx import helper, numpy_helper

    from rankbook.plugins import contract

    outputs = [port.name for port in node.operator.outputs] if node.operator else []
    call = helper.make_node(
        node.op_type, list(node.ports()), outputs, name=node.name, domain=contract.DOMAIN, **node.attributes
    )
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in inputs.items()
    ]
    # The types of the outputs are inferred from the body.
    graph = helper.make_graph(
        [call],
        node.name or "node",
        values,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    single = helper.make_model(graph, opset_imports=model.proto.opset_import, functions=model.proto.functions)
    single.ir_version = model.proto.ir_version
    serialized: bytes = single.SerializeToString()
    return serialized


def graph_with_outputs(model: ExportedModel, names: list[str]) -> bytes:
    """Return the serialized graph of a file in which the values ``names`` are outputs too; weights stay outside.

    Types and shapes are those that the graph states. Of a value of which it says nothing the type is that of the
    activations, since TensorRT takes no output without one.
    """
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(model.proto)
    present = {value.name for value in graph.graph.output}
    known = {value.name: value for value in graph.graph.value_info}
    usual = onnx.TensorProto.DataType.Value(_ELEMENTS.get(model.metadata.dtype, "FLOAT"))
    for name in names:
        if name not in present:
            graph.graph.output.append(known.get(name) or onnx.helper.make_tensor_value_info(name, usual, None))
    serialized: bytes = graph.SerializeToString()
    return serialized
