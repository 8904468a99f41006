"""Checks that every layer with a cache applies the mask of the text."""

from __future__ import annotations

import onnx_ir as ir

from rankbook.exporter.passes.attention import is_attention
from rankbook.exporter.passes.kv_cache import cache_layers

_STEPS = {"Add", "Cast", "Div", "Expand", "Max", "Mul", "Reshape", "Slice", "Unsqueeze"}
"""Operators between a softmax and the mask that was added to its scores."""
_LOW = -1e4
"""A number below this hides what it is added to; half the lowest float16 is -32752."""


class CheckMasks(ir.passes.InPlacePass):
    """Counts the attentions that read the mask; there must be one for each layer with a cache.

    * Attention with a boolean mask (`rankbook.exporter.attention.mask`).
    * Softmax of scores to which the mask was added as numbers (`rankbook.exporter.attention.additive_mask`).

    Anything else would be a file that runs and sees tokens of the future.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leave the model as it is.

        Raises:
            ValueError: A layer does not use the mask.
        """
        layers = cache_layers(model.graph.outputs)
        masked = sum(_is_masked(node) for node in model.graph)
        if masked != layers:
            raise ValueError(
                f"{layers} layers keep keys and values and {masked} apply the mask in a known way: the exported model"
                " would see tokens that it must not; evaluate the checkpoint in PyTorch"
            )
        return ir.passes.PassResult(model, modified=False)


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
