"""Operators of ours that work on rows and hold no packed weights, as data. No other file spells these strings.

They are what remains of a decoder block between attention and packed products. In ONNX Runtime each is one or two nodes
of its own, which take longer than the arithmetic where a row is a few hundred numbers; their bodies are these nodes.
float32 only: for other types the exporter leaves ONNX Runtime's nodes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowContract:
    """One operator.

    Attributes:
        name: The op_type.
        inputs: What each input is, by name; K numbers of a row, ``...`` any leading dimensions.
        outputs: The same of the outputs.
        floats: Float attributes, all required.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    floats: tuple[str, ...] = ()


ADD_NORM = RowContract(
    "AddRMSNormalization",
    {"a": "(..., K)", "b": "(..., K)", "scale": "(K), an initializer"},
    {"y": "sum / sqrt(mean(sum ** 2) + epsilon) * scale, (..., K)", "sum": "a + b, (..., K)"},
    ("epsilon",),
)
"""The sum of a residual stream and what a layer adds to it, and its normalization."""
SWIGLU = RowContract(
    "SwiGLU",
    {"gate": "(...)", "up": "(...), the same shape"},
    {"y": "gate * sigmoid(gate) * up, the same shape"},
)
"""The gate of a feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

OPERATORS = {operator.name: operator for operator in (ADD_NORM, SWIGLU)}
"""Every such operator by its op_type."""
