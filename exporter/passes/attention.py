"""Spells out attention where TensorRT has no kernel for the Attention operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rankbook.exporter.attention import SINKS
from rankbook.exporter.rewrite import TRACE_DOMAIN, Writer, fixed_size, float_attribute, given

_KERNEL_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_KERNEL_STEP, _KERNEL_MAX = 16, 256
"""Head sizes with a kernel: multiples of the step up to the maximum (tried with TensorRT-RTX 1.7)."""
_KINDS = (("", "Attention"), (TRACE_DOMAIN, SINKS))


def is_attention(node: ir.Node) -> bool:
    """Return whether a node is an attention, with or without sinks."""
    return (node.domain, node.op_type) in _KINDS


class DecomposeAttention(ir.passes.InPlacePass):
    """Replaces Attention by MatMul and Softmax.

    * float32 activations: TensorRT has kernels for half precision only and refuses to build anything else.
    * Head sizes without a kernel, and what its parser refuses: a softcap (Gemma 2), values of another size than keys
      (multi-head latent attention of DeepSeek). `rankbook.exporter.passes.static_cache.PadHeads` makes others of them.
    * Sinks (gpt-oss), which the operator does not have: a term in the denominator of the softmax of each head. In half
      precision `rankbook.exporter.passes.static_cache.SinkSlots` makes slots of them.

    Other nodes stay. Query heads that share a key head are computed together, so keys are not repeated; the boolean
    mask becomes a bias once for all layers that use it. Every row of the mask has a key, see
    `rankbook.exporter.attention`, so a finite bias is enough.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        masks: dict[str, ir.Value] = {}
        changed = False
        for node in [node for node in model.graph if is_attention(node)]:
            if not _has_kernel(node):
                _Decomposition(model.graph, node, masks).apply()
                changed = True
        return ir.passes.PassResult(model, modified=changed)


class _Decomposition:
    """The nodes that take the place of one Attention node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, masks: dict[str, ir.Value]) -> None:
        self._node, self._masks = node, masks
        self._writer = Writer(graph, str(node.name))
        self._op = self._writer.op
        query, key = given(node, 0), given(node, 1)
        if query.dtype is None:
            raise ValueError(f"attention node {node.name!r} has inputs without a type")
        self._dtype = query.dtype
        self._heads, self._key_heads, self._size = fixed_size(query, 1), fixed_size(key, 1), fixed_size(query, 3)

    def apply(self) -> None:
        """Replace the node."""
        query, key, value, mask = self._node.inputs[:4]
        scores = self._op("MatMul", self._queries(query), self._keys(key))
        softcap = float_attribute(self._node, "softcap", 0.0)
        if softcap:
            scores = self._op("Tanh", self._op("Mul", scores, self._number(1 / softcap)))
            scores = self._op("Mul", scores, self._number(softcap))
        weights = self._weights(self._op("Add", scores, self._bias(mask)))
        result = self._op(
            "Reshape",
            self._op("MatMul", weights, self._grouped(value)),
            self._writer.ints(0, self._heads, -1, fixed_size(given(self._node, 2), 3)),
        )
        self._writer.replace(self._node, {self._node.outputs[0]: result})

    def _weights(self, scores: ir.Value) -> ir.Value:
        """Return the softmax of scores (batch, key heads, queries of each, sequence, keys), and of any sinks."""
        if not self._node.domain:
            return self._op("Softmax", scores, axis=-1)
        sinks = self._op(
            "Reshape", self._node.inputs[4], self._writer.ints(1, self._key_heads, self._heads // self._key_heads, 1, 1)
        )
        shape = self._op("Concat", self._op("Shape", scores, start=0, end=4), self._writer.ints(1), axis=0)
        both = self._op("Concat", scores, self._op("Expand", sinks, shape), axis=-1)
        ends = (self._writer.ints(number) for number in (0, -1, -1))
        return self._op("Slice", self._op("Softmax", both, axis=-1), *ends)

    def _queries(self, query: ir.Value | None) -> ir.Value:
        """Return scaled queries (batch, key heads, queries of each, sequence, size)."""
        scale = float_attribute(self._node, "scale", self._size**-0.5)
        scaled = query if scale == 1.0 else self._op("Mul", query, self._number(scale))
        return self._op(
            "Reshape", scaled, self._writer.ints(0, self._key_heads, self._heads // self._key_heads, -1, self._size)
        )

    def _keys(self, key: ir.Value | None) -> ir.Value:
        return self._op("Transpose", self._grouped(key), perm=[0, 1, 2, 4, 3])

    def _grouped(self, value: ir.Value | None) -> ir.Value:
        """Add the axis along which query heads share a key head."""
        return self._op("Unsqueeze", value, self._writer.ints(2))

    def _bias(self, mask: ir.Value | None) -> ir.Value:
        """Return 0 where the mask allows and the lowest number elsewhere, (batch, 1, 1, sequence, keys)."""
        if mask is None or mask.name is None:
            raise ValueError(f"attention node {self._node.name!r} has no mask")
        if mask.name not in self._masks:
            self._masks[mask.name] = self._grouped(as_numbers(self._writer, mask, self._dtype))
        return self._masks[mask.name]

    def _number(self, number: float) -> ir.Value:
        return self._writer.number(number, self._dtype)


def as_numbers(writer: Writer, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return a boolean mask as numbers to add to scores: 0 where a query sees a key, a very low one elsewhere."""
    # Half of the lowest number: a score that is added must not make it infinite.
    lowest = float(np.finfo(np.float16 if dtype == ir.DataType.FLOAT16 else np.float32).min) * 0.5
    return writer.op("Where", mask, writer.number(0.0, dtype), writer.number(lowest, dtype))


def kernel_size(node: ir.Node) -> int | None:
    """Return the smallest head size with a kernel that queries, keys and values fit into; None where none does."""
    query, value = given(node, 0), given(node, 2)
    if query.dtype not in _KERNEL_TYPES or float_attribute(node, "softcap", 0.0):
        return None
    sizes = [item.shape[3] for item in (query, value) if item.shape is not None]
    known = [size for size in sizes if isinstance(size, int)]
    if query.shape is None or len(known) < len(sizes):
        return None
    size = -(-max(known) // _KERNEL_STEP) * _KERNEL_STEP
    return size if size <= _KERNEL_MAX else None


def _has_kernel(node: ir.Node) -> bool:
    size = None if node.domain else kernel_size(node)
    shapes = [given(node, place).shape for place in (0, 2)]
    return size is not None and all(shape is None or shape[3] == size for shape in shapes)
