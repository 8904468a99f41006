"""Writes new keys and values into a cache of a fixed length, in sizes of heads that attention has kernels for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rankbook.exporter.attention import SINKS
from rankbook.exporter.passes.attention import as_numbers, kernel_size
from rankbook.exporter.rewrite import TRACE_DOMAIN, NodePass, Writer, fixed_size, float_attribute, given, producer
from rankbook.exporter.static import SCATTER

SCATTER_OPSET = 24
"""First version of the standard operators with TensorScatter; those of 23 that are used here only got more types."""


class ScatterCache(ir.passes.InPlacePass):
    """Replaces the placeholders of `rankbook.exporter.static` by TensorScatter along the slots.

    Past and present may then be one buffer (ONNX Runtime and TensorRT write in place). Inputs that nothing reads are
    left out: with the logits of all positions, the lengths of the rows.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        graph = model.graph
        for node in [node for node in graph if (node.domain, node.op_type) == (TRACE_DOMAIN, SCATTER)]:
            writer = Writer(graph, str(node.outputs[0].name))
            written = writer.op("TensorScatter", *node.inputs, axis=2, mode="linear")
            writer.replace(node, {node.outputs[0]: written})
        rows = [value for value in graph.inputs if value.name in ("write_indices", "lengths")]
        for value in [value for value in rows if not value.consumers()]:
            graph.inputs.remove(value)
        return ir.passes.PassResult(model, modified=True)


class PadHeads(NodePass):
    """Appends zeros to heads of sizes for which TensorRT has no attention kernel, up to one for which it has.

    These are heads whose values are narrower than their keys (multi-head latent attention of DeepSeek), and sizes that
    are no multiple of the kernels' step. Zeros behind queries and keys leave the scores as they are, and the result of
    values with zeros is cut. What is stored is padded before it is written, for padding the whole cache would copy it
    in every step; so such a cache has the padded size. Keys and values that are computed from a cache in every step
    (those of latent attention) are padded as they are.
    """

    kind = "Attention"

    def change(self, graph: ir.Graph, node: ir.Node) -> bool:
        """Pad one attention and its cache, unless something else reads that."""
        size, inputs = kernel_size(node), [given(node, place) for place in range(3)]
        output = node.outputs[0]
        sizes = {None if each.shape is None else each.shape[3] for each in (*inputs, output)}
        if size is None or sizes == {size} or not all(isinstance(each, int) for each in sizes):
            return False
        stored = [each for each in inputs[1:] if producer(each, "TensorScatter")]
        if not all(_read_by_attention(cache, size) for cache in stored):
            return False
        for cache in stored:
            _widen(graph, cache, size)
        writer = Writer(graph, str(node.name))
        scale = float_attribute(node, "scale", fixed_size(inputs[0], 3) ** -0.5)
        padded = [_padded(writer, each, size) for each in inputs]
        wide = writer.node("Attention", [*padded, *node.inputs[3:]], name=str(node.name))
        wide.attributes.update(node.attributes)
        wide.attributes["scale"] = ir.AttrFloat32("scale", scale)
        wide.outputs[0].type = output.type
        result, width = wide.outputs[0], fixed_size(output, 3)
        if width < size:
            result = writer.op("Slice", result, *(writer.ints(number) for number in (0, width, -1)))
        writer.replace(node, {output: result})
        return True


class SinkSlots(ir.passes.InPlacePass):
    """Makes attention sinks one more slot of the cache, behind the others, so that attention has a kernel.

    Nobody writes that slot, so that it holds zeros: its score is what the mask adds, the sink of the head, and its
    value is nothing. The mask is in numbers then, and one for each head (batch, heads, sequence, slots + 1).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        graph, masks = model.graph, dict[str, ir.Value]()
        nodes = [node for node in graph if (node.domain, node.op_type) == (TRACE_DOMAIN, SINKS)]
        changed = [node for node in nodes if self._change(graph, node, masks)]
        return ir.passes.PassResult(model, modified=bool(changed))

    @staticmethod
    def _change(graph: ir.Graph, node: ir.Node, masks: dict[str, ir.Value]) -> bool:
        query, key, value, mask, sinks = (given(node, place) for place in range(5))
        scatters = [found for cache in (key, value) if (found := producer(cache, "TensorScatter"))]
        # Another layer that reads the cache would see a slot more than its mask has.
        alone = all(user is node for cache in (key, value) for user in cache.consumers())
        if kernel_size(node) is None or query.dtype is None or len(scatters) < 2 or not alone:
            return False
        slots = fixed_size(mask, 3) + 1
        for scatter in scatters:
            for cache in (given(scatter, 0), scatter.outputs[0]):
                dims = list(cache.shape or ())
                cache.shape = ir.Shape([*dims[:2], slots, *dims[3:]])
        writer = Writer(graph, str(node.name))
        if mask.name not in masks:
            seen = as_numbers(writer, mask, query.dtype)
            masks[str(mask.name)] = writer.op("Pad", seen, writer.ints(0, 0, 0, 0, 0, 0, 0, 1))
        is_sink = writer.array(f"sink_slot.{slots}", np.arange(slots) == slots - 1)
        each = writer.op("Reshape", sinks, writer.ints(1, -1, 1, 1))
        bias = writer.op("Where", is_sink, each, masks[str(mask.name)])
        made = writer.node("Attention", [query, key, value, bias], name=str(node.name))
        made.attributes.update(node.attributes)
        writer.replace(node, {node.outputs[0]: made.outputs[0]})
        return True


def _read_by_attention(cache: ir.Value, size: int) -> bool:
    """Return whether what a cache holds goes to attentions alone that can have heads of a size."""
    return all(user.op_type == PadHeads.kind and kernel_size(user) == size for user in cache.consumers())


def _widen(graph: ir.Graph, present: ir.Value, size: int) -> None:
    """Give a cache (batch, heads, slots, ...) another size of heads, with zeros behind what is written."""
    scatter = present.producer()
    if scatter is None or fixed_size(present, 3) == size:
        return
    writer = Writer(graph, str(present.name))
    scatter.replace_input_with(1, _padded(writer, given(scatter, 1), size))
    graph.insert_before(scatter, writer.nodes)
    for value in (given(scatter, 0), present):
        value.shape = ir.Shape([*_dims(value), size])


def _padded(writer: Writer, value: ir.Value, size: int) -> ir.Value:
    """Return a value (batch, heads, tokens, ...) with zeros at the end of its last axis."""
    missing = size - fixed_size(value, 3)
    if not missing:
        return value
    padded = writer.op("Pad", value, writer.ints(0, 0, 0, 0, 0, 0, 0, missing))
    padded.type, padded.shape = value.type, ir.Shape([*_dims(value), size])
    return padded


def _dims(value: ir.Value) -> list[int | ir.SymbolicDim]:
    """Return the sizes of all axes but the last."""
    return list(value.shape or ())[:-1]


class RaiseOpset(ir.passes.InPlacePass):
    """Declares `SCATTER_OPSET` in the model and in its functions, which must agree."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the model in place."""
        for imports in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
            imports[""] = SCATTER_OPSET
        return ir.passes.PassResult(model, modified=True)
