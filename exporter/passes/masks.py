"""Checks that every layer with a cache applies the mask of the text, and that states are continued."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rankbook.exporter import cache_names
from rankbook.exporter.passes.attention import is_attention
from rankbook.exporter.passes.kv_cache import cache_layers, nearest_layer
from rankbook.exporter.recurrence import RECURRENCE
from rankbook.exporter.rewrite import TRACE_DOMAIN, given

_STEPS = {"Add", "Cast", "Div", "Expand", "Max", "Mul", "Reshape", "Slice", "Unsqueeze"}
"""Operators between a softmax and the mask that was added to its scores."""
_MOVES = {"Cast", "GatherElements", "Slice", "Transpose"}
"""Operators between a state and what continues it."""
_LOW = -1e4
"""A number below this hides what it is added to; half the lowest float16 is -32752."""


class CheckMasks(ir.passes.InPlacePass):
    """Counts the attentions that read the mask; there must be one for each layer with a cache.

    * Attention with a boolean mask (`rankbook.exporter.attention.mask`).
    * Softmax of scores to which the mask was added as numbers (`rankbook.exporter.attention.additive_mask`).

    Anything else would be a file that runs and sees tokens of the future. A state must go from its input to its output
    through one recurrence, and the last inputs of a convolution must be joined with new ones before it: a file without
    that would forget the text at every call.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave the model as it is.

        Raises:
            ValueError: A layer does not use the mask, or does not continue its state.
        """
        layers = cache_layers(model.graph.outputs)
        masked = sum(_is_masked(node) for node in model.graph)
        if masked != layers and not _several(model.graph):
            raise ValueError(
                f"{layers} layers keep keys and values and {masked} apply the mask in a known way: the exported model"
                " would see tokens that it must not; evaluate the checkpoint in PyTorch"
            )
        inputs = {str(value.name): value for value in model.graph.inputs}
        for name, value in inputs.items():
            if cache_names.is_state(name) and not _continued(value, model.graph.outputs):
                raise ValueError(
                    f"{name!r} does not reach its output through the layer that it belongs to: the exported model would"
                    " forget the text; evaluate the checkpoint in PyTorch"
                )
        return ir.passes.PassResult(model, modified=False)


def _continued(past: ir.Value, outputs: Sequence[ir.Value]) -> bool:
    """Return whether a state goes through a recurrence, or is joined with what enters a convolution."""
    present = next((value for value in outputs if cache_names.past_of(str(value.name)) == past.name), None)
    made = _moved(present)
    node = None if made is None else made.producer()
    if node is None or _moved(node.inputs[0]) is not past:
        return False
    if cache_names.part_of(str(past.name)) == "state":
        return (node.domain, node.op_type) == (TRACE_DOMAIN, RECURRENCE)
    return node.op_type == "Concat" and any(use.op_type in ("Cast", "Conv") for use in node.outputs[0].consumers())


def _moved(value: ir.Value | None) -> ir.Value | None:
    """Return what a value was before it was cast, cut or transposed."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _MOVES:
        value = node.inputs[0]
    return value


def _several(graph: ir.Graph) -> bool:
    """Return whether a cache is read by several attentions, each with a mask, and none is read by none (DiffLlama)."""
    attentions = [node for node in graph if is_attention(node)]
    if not attentions or [node for node in graph if _is_masked(node)] != attentions:
        return False
    read = {nearest_layer(given(node, 1)) for node in attentions}
    names = (str(value.name) for value in graph.inputs)
    return read == {cache_names.layer_of(name) for name in names if name.startswith(cache_names.PAST)}


def _is_masked(node: ir.Node) -> bool:
    if not node.domain and node.op_type == "Softmax":
        return _has_mask(node.inputs[0])
    if not is_attention(node):
        return False
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    return mask is not None and mask.dtype == ir.DataType.BOOL


def _has_mask(scores: ir.Value | None) -> bool:
    """Return whether a mask is among the terms of a sum."""
    node = None if scores is None else scores.producer()
    if node is None or node.domain:
        return False
    if node.op_type == "Where":
        seen, hidden = (None if value is None else value.const_value for value in node.inputs[1:])
        numbers = [float(value.numpy().item()) for value in (seen, hidden) if value is not None and value.size == 1]
        return len(numbers) == 2 and numbers[0] == 0 and numbers[1] < _LOW
    terms = node.inputs if node.op_type == "Add" else node.inputs[:1]
    return node.op_type in _STEPS and any(_has_mask(term) for term in terms)
