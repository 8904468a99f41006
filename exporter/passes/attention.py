"""Spells out attention where TensorRT has no kernel for the Attention operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_KERNEL_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_KERNEL_STEP, _KERNEL_MAX = 16, 256
"""Head sizes with a kernel: multiples of the step up to the maximum (tried with TensorRT-RTX 1.7)."""


class DecomposeAttention(ir.passes.InPlacePass):
    """Replaces Attention by MatMul and Softmax.

    * float32 activations: TensorRT has kernels for half precision only and refuses to build anything else.
    * Head sizes without a kernel, and a softcap (Gemma 2), which its parser refuses.

    Other nodes stay. Query heads that share a key head are computed together, so keys are not repeated; the boolean
    mask becomes a bias once for all layers that use it. Every row of the mask has a key, see
    `rankbook.exporter.attention`, so a finite bias is enough.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        masks: dict[str, ir.Value] = {}
        changed = False
        for node in list(model.graph):
            if node.domain == "" and node.op_type == "Attention" and not _has_kernel(node):
                _Decomposition(model.graph, node, masks).apply()
                changed = True
        return ir.passes.PassResult(model, modified=changed)


class _Decomposition:
    """The nodes that take the place of one Attention node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, masks: dict[str, ir.Value]) -> None:
        self._graph, self._node, self._masks = graph, node, masks
        self._nodes: list[ir.Node] = []
        query, key = node.inputs[0], node.inputs[1]
        if query is None or key is None or query.shape is None or key.shape is None or query.dtype is None:
            raise ValueError(f"attention node {node.name!r} has inputs without a shape")
        self._dtype = query.dtype
        self._heads, self._key_heads, self._size = (_known(query, 1), _known(key, 1), _known(query, 3))

    def apply(self) -> None:
        """Replace the node."""
        query, key, value, mask = self._node.inputs[:4]
        scores = self._op("MatMul", self._queries(query), self._keys(key))
        softcap = _float(self._node, "softcap", 0.0)
        if softcap:
            scores = self._op("Tanh", self._op("Mul", scores, self._constant(1 / softcap)))
            scores = self._op("Mul", scores, self._constant(softcap))
        weights = self._op("Softmax", self._op("Add", scores, self._bias(mask)), axis=-1)
        result = self._op(
            "Reshape", self._op("MatMul", weights, self._grouped(value)), self._ints(0, self._heads, -1, self._size)
        )
        old = self._node.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        replaced = [output for output in self._node.outputs if output.uses() or output is old]
        ir.convenience.replace_nodes_and_values(self._graph, self._node, [self._node], self._nodes, replaced, [result])

    def _queries(self, query: ir.Value | None) -> ir.Value:
        """Return scaled queries (batch, key heads, queries of each, sequence, size)."""
        scale = _float(self._node, "scale", self._size**-0.5)
        scaled = query if scale == 1.0 else self._op("Mul", query, self._constant(scale))
        return self._op(
            "Reshape", scaled, self._ints(0, self._key_heads, self._heads // self._key_heads, -1, self._size)
        )

    def _keys(self, key: ir.Value | None) -> ir.Value:
        return self._op("Transpose", self._grouped(key), perm=[0, 1, 2, 4, 3])

    def _grouped(self, value: ir.Value | None) -> ir.Value:
        """Add the axis along which query heads share a key head."""
        return self._op("Unsqueeze", value, self._ints(2))

    def _bias(self, mask: ir.Value | None) -> ir.Value:
        """Return 0 where the mask allows and the lowest number elsewhere, (batch, 1, 1, sequence, keys)."""
        if mask is None or mask.name is None:
            raise ValueError(f"attention node {self._node.name!r} has no mask")
        if mask.name not in self._masks:
            lowest = float(np.finfo(np.float16 if self._dtype == ir.DataType.FLOAT16 else np.float32).min) * 0.5
            bias = self._op("Where", mask, self._constant(0.0), self._constant(lowest))
            self._masks[mask.name] = self._grouped(bias)
        return self._masks[mask.name]

    def _op(self, op_type: str, *inputs: ir.Value | None, **attributes: int | list[int]) -> ir.Value:
        name = f"{self._node.name}.{op_type}.{len(self._nodes)}"
        node = ir.node(op_type, list(inputs), attributes, name=name)
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def _constant(self, number: float) -> ir.Value:
        return self._initializer(f"attention.{number!r}", ir.tensor(np.array(number, self._dtype.numpy())))

    def _ints(self, *numbers: int) -> ir.Value:
        name = "attention.shape." + "_".join(map(str, numbers))
        return self._initializer(name, ir.tensor(np.array(numbers, np.int64)))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._graph.initializers:
            shape = ir.Shape(tensor.shape.numpy())
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _known(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"axis {axis} of {value.name!r} has no fixed size")
    return size


def _has_kernel(node: ir.Node) -> bool:
    query = node.inputs[0]
    if query is None or query.shape is None or _float(node, "softcap", 0.0):
        return False
    size = query.shape[3]
    return query.dtype in _KERNEL_TYPES and isinstance(size, int) and size % _KERNEL_STEP == 0 and size <= _KERNEL_MAX


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()
