"""Operators on rows that hold no packed weights: what remains of a decoder block between attention and products.

In ONNX Runtime each is one or two nodes of its own, which take longer than the arithmetic where a row is a few hundred
elements; their bodies are these nodes. float32 only: for other types the exporter leaves ONNX Runtime's nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rankbook.plugins.contract import Array, Attribute, Operator, Port, Stock

_FLOAT = ("float32",)


def _rows(name: str, doc: str) -> Port:
    return Port(name, (("...", "K"),), _FLOAT, False, doc)


def add_norm(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
    """Return ``sum / sqrt(mean(sum ** 2) + epsilon) * scale`` and ``sum = a + b``, (..., K) each, in float32.

    The sum is rounded to float32, as it is an output; what follows is computed in float64.
    """
    total = inputs["a"].astype(np.float32) + inputs["b"].astype(np.float32)
    wide = total.astype(np.float64)
    mean = np.square(wide).mean(axis=-1, keepdims=True)
    y = wide / np.sqrt(mean + float(attributes["epsilon"])) * inputs["scale"].astype(np.float64)
    return y.astype(np.float32), total


def swiglu(inputs: Mapping[str, Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
    """Return ``gate * sigmoid(gate) * up``, (..., K), computed in float64 and rounded to float32."""
    del attributes
    gate, up = (inputs[name].astype(np.float64) for name in ("gate", "up"))
    with np.errstate(over="ignore", invalid="ignore"):
        return ((gate / (1 + np.exp(-gate)) * up).astype(np.float32),)


ADD_NORM = Operator(
    "AddRMSNormalization",
    "AddRMSNormalization",
    (
        _rows("a", "residual stream"),
        _rows("b", "added"),
        Port("scale", (("K",),), _FLOAT, True, "of the normalization"),
    ),
    (_rows("y", "the sum, normalized and scaled"), _rows("sum", "a + b")),
    (Attribute("epsilon", "float", "added to the mean of the squares"),),
    add_norm,
    "stock",
    stock=Stock("SkipSimplifiedLayerNormalization", (0, 3)),
)
"""The sum of a residual stream and what a layer adds to it, and its normalization (Zhang 2019, arXiv 1910.07467)."""
SWIGLU = Operator(
    "SwiGLU",
    "SwiGLU",
    (_rows("gate", "what is gated"), _rows("up", "of the same shape")),
    (_rows("y", "gate * sigmoid(gate) * up"),),
    (),
    swiglu,
    "swiglu",
)
"""The gate of a feed-forward layer (Shazeer 2020, arXiv 2002.05202)."""

OPERATORS = (ADD_NORM, SWIGLU)
"""The operators of this module."""
