"""Numpy definition of products and gathers: weights are decoded in float32, as by every runtime; products in float64.

Products that round x to 8 bits are defined in `rankbook.plugins.int8`; letters as in `rankbook.plugins.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rankbook.plugins import layout

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]


def codebooks(levels: Array, params: Array, step: Array, base: Array, out_features: int) -> FloatArray:
    """Return the codebooks of all groups, float32 (N, G, L): levels (Q, L) weighted by the group parameters."""
    dense = params.astype(np.float32) * step.astype(np.float32) + base.astype(np.float32)
    books: FloatArray = layout.unpack_rows(dense, out_features).astype(np.float32) @ levels.astype(np.float32)
    return books


def weight(codes: Array, books: FloatArray, out_features: int, in_features: int) -> FloatArray:
    """Return the decoded weight, float32 (N, K), from packed codes (int8 carrier) and codebooks (N, G, L)."""
    index = layout.unpack_codes(layout.from_carrier(codes.astype(np.int8)), out_features, in_features)
    grouped = index.reshape(out_features, books.shape[1], -1).astype(np.int64)
    return np.take_along_axis(books, grouped, axis=2).reshape(out_features, in_features)


def codebook_matmul(inputs: Mapping[str, Array], attributes: Mapping[str, int | str]) -> Array:
    """Return ``x @ W.T + bias``, with the error branch if ``down`` and ``up`` are given, in the dtype of x (..., K)."""
    rows, columns = int(attributes["out_features"]), int(attributes["in_features"])
    books = codebooks(inputs["levels"], inputs["params"], inputs["step"], inputs["base"], rows)
    x = inputs["x"].astype(np.float64)
    y = x @ weight(inputs["codes"], books, rows, columns).T.astype(np.float64) + inputs["bias"].astype(np.float64)
    if "down" in inputs:
        down = inputs["down"].astype(np.float64) * inputs["down_scale"].astype(np.float64)
        up = inputs["up"].astype(np.float64) * inputs["up_scale"].astype(np.float64)
        y += (x @ down.T) @ up.T
    result: Array = y.astype(inputs["x"].dtype)
    return result


def codebook_gather(inputs: Mapping[str, Array], attributes: Mapping[str, int | str]) -> Array:
    """Return rows of W, float32 (..., K), for indices (...)."""
    rows, columns = int(attributes["out_features"]), int(attributes["in_features"])
    books = codebooks(inputs["levels"], inputs["params"], inputs["step"], inputs["base"], rows)
    return weight(inputs["codes"], books, rows, columns)[inputs["indices"].astype(np.int64)]
