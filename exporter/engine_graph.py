"""What TensorRT builds of a file with experts of a mixture where it has no plugin for them.

The exported file stays as it is: its body reads the chosen experts alone in ONNX Runtime, of operators that TensorRT
does not know. The graph here has `rankbook.exporter.bodies.experts_engine` in its place and the same data files; see
there why constants of bytes become INT32.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from rankbook.exporter.bodies import experts_engine
from rankbook.exporter.file import ExportedModel
from rankbook.plugins.contract import DOMAIN
from rankbook.plugins.operators import OPERATORS

_WORD = 4
"""Bytes of an INT32."""


def with_engine_bodies(model: ExportedModel) -> onnx.ModelProto:
    """Return the graph with bodies of products of experts that TensorRT can build; others as they are."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    made: set[str] = set()
    for node in proto.graph.node:
        operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
        if operator is None or operator.one_of is None:
            continue
        ports = dict(zip(operator.input_names(), node.input, strict=True))
        of_bytes = [name for name in operator.constants() if model.tensors[ports[name]].dtype == "int8"]
        words = [name for name in of_bytes if _as_words(name, tensors[ports[name]])]
        for name in set(of_bytes) - set(words):
            floats = model.tensors[ports[name]].numpy().astype(np.float32)
            tensors[ports[name]].CopyFrom(numpy_helper.from_array(floats, ports[name]))
        node.op_type = experts_engine.name_of(operator, words)
        if node.op_type not in made:
            made.add(node.op_type)
            proto.functions.extend(experts_engine.functions(operator, words))
    return proto


def _as_words(name: str, tensor: TensorProto) -> bool:
    """Let a tensor of INT8, the constants of all experts, be INT32 if the bytes of an expert are whole words."""
    experts, *one = tensor.dims
    last = math.prod(one) if name in experts_engine.FLAT else one[-1]
    if last % _WORD:
        return False
    if not tensor.HasField("raw_data") and tensor.data_location != tensor.EXTERNAL:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))  # bytes, not numbers
    lead = [experts] if name in experts_engine.FLAT else [experts, *one[:-1]]
    tensor.data_type = TensorProto.INT32
    tensor.dims[:] = [*lead, last // _WORD]
    return True
