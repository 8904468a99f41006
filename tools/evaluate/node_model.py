"""Small graphs made from an exported file: one node on its own, or the whole file with more outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rankbook.tools.inspect import onnx_file
from rankbook.tools.inspect.onnx_file import CustomNode, OnnxFile

Array = np.ndarray[Any, Any]


def single_node(model: OnnxFile, node: CustomNode, constants: dict[str, Array], inputs: dict[str, Array]) -> bytes:
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

    source = onnx_file.load_graph(model.path)
    call = helper.make_node(
        node.op_type, list(node.ports()), ["y"], name=node.name, domain=contract.DOMAIN, **node.attributes
    )
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in inputs.items()
    ]
    # The output's type is inferred from the body.
    graph = helper.make_graph(
        [call],
        node.name or "node",
        values,
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    single = helper.make_model(graph, opset_imports=source.opset_import, functions=source.functions)
    single.ir_version = source.ir_version
    serialized: bytes = single.SerializeToString()
    return serialized


def graph_with_outputs(model: OnnxFile, names: list[str]) -> bytes:
    """Return the serialized graph of a file in which the values ``names`` are outputs too; weights stay outside."""
    import onnx

    graph = onnx_file.load_graph(model.path)
    present = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    serialized: bytes = graph.SerializeToString()
    return serialized
