"""Numpy ground truth of products with activations of 8 bits: integer products, then fp32 in an order that is fixed.

The definition of the operators ``CodebookMatMul<bits>A8`` and ``CodebookMatMulLowRank<bits>A8``, and of the native
library's session entry ``rankbook.activations`` = ``int8``, which computes the other products the same way. Results of
the library equal these functions bit for bit on every instruction set; the order of the fp32 operations below is part
of the definition. ``fused(a, b, c)`` is a * b + c rounded once, everything else is rounded after each operation.

Letters as in `rankbook.plugins.contract`; M rows of x, g one of G groups, p one of P planes of levels.

1. **Activations.** `quantize` each group of each row of x: ``x[m, k] ~ scale[m, g] * q[m, k]``, q in [-127, 127]. With
   one group per row this is the usual scale per token; with smaller groups a large activation spoils its own group
   only (SmolLM2-135M, unquantized weights, 3 thousand tokens: perplexity 29.94 becomes 30.11 with groups of 64, 30.71
   with one scale per token).
2. **Levels.** Rows of whole numbers within [-255, 255] whose range is at most 255 stay as they are, with unit 1 (all
   that the methods store but NF4); others are rounded by `quantize`, whose scale is their unit.
3. **Products.** ``dot[m, n, g, p] = sum of q[m, k] * level[p, code[n, k]]`` over the group, exactly (int32).
4. **Scaling**, from total 0, for each group in order::

       for each plane p:  total = fused(float(dot) * scale[m, g], value[n, g, p], total)
       if offset:         total = fused(float(sum of q) * scale[m, g], value[n, g, P], total)

   with ``value = fused(params, step * unit, base * unit)``; the offset's unit is 1.
5. **Error branch.** Rows of ``down`` that are not stored as int8 are rounded by `quantize`. ``dot`` as above, then
   ``u[m, r] = sum over groups of float(dot) * scale[m, g]``, in order, times (down scale * up scale); then for each
   rank in order ``total = fused(u[m, r], up[n, r], total)``.
6. ``y = total + bias``, rounded to the type of x.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from rankbook.plugins import layout
from rankbook.plugins.forms import Form, TensorSpec
from rankbook.plugins.layer_spec import LayerSpec

Array = npt.NDArray[np.generic]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]

TOP = 127
"""Largest magnitude of a rounded activation."""
LARGEST_LEVEL = 255
"""Largest magnitude, and largest range, of whole-numbered levels that are used as they are."""
LARGEST_GROUP = 65536
"""Inputs of a group beyond which an int32 sum could overflow: 255 * 127 * 65536 < 2**31."""
SMALLEST = 2.0**-100
"""Rows of which no number reaches this are rounded to zeros."""


def fused(a: Array, b: Array, c: Array) -> FloatArray:
    """Return ``a * b + c`` of float32 arrays with a single rounding.

    The product is exact in float64. Rounding its sum to float64 and then to float32 would round twice; rounding to odd
    in between makes the second rounding right (Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded
    sums").
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1).view(np.float64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    result: FloatArray = np.where(inexact, odd, total).astype(np.float32)
    return result


def quantize(rows: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Round float32 rows (..., K) to int8 symmetrically, one scale a row.

    Returns:
        Integers (..., K) and scales float32 (...). Rows below 2**-100 give zeros; rows that hold an infinity or a NaN
        give zeros and the scale NaN, so that the output is NaN too.
    """
    largest = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float32)
    with np.errstate(all="ignore"):
        usable = (largest >= np.float32(SMALLEST)) & np.isfinite(largest)
        inverse = np.where(usable, np.float32(TOP) / largest, np.float32(0))
        scaled = np.where(usable, rows * inverse, np.float32(0))
        scale = np.where(usable, largest / np.float32(TOP), np.where(largest < np.float32(SMALLEST), 0, np.nan))
    return np.rint(scaled).astype(np.int8), scale[..., 0].astype(np.float32)


def integer_levels(levels: FloatArray) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Return whole-numbered levels int32 (P, L) and the unit of each plane, float32 (P,): step 2 of the definition."""
    rounded, units = quantize(levels)
    whole = (levels == np.rint(levels)) & (np.abs(levels) <= LARGEST_LEVEL)
    as_is = whole.all(axis=1) & (levels.max(axis=1) - levels.min(axis=1) <= LARGEST_LEVEL)
    integers = np.where(as_is[:, None], levels, rounded.astype(np.float32)).astype(np.int32)
    return integers, np.where(as_is, np.float32(1), units).astype(np.float32)


def codebook_matmul(inputs: Mapping[str, Array], attributes: Mapping[str, int | str]) -> Array:
    """Return ``x @ W.T (+ branch) + bias`` in the int8 mode, in the dtype of x (..., K).

    Raises:
        ValueError: A group is longer than `LARGEST_GROUP`.
    """
    held = {name: TensorSpec(value.shape, str(value.dtype)) for name, value in inputs.items() if name != "x"}
    spec = LayerSpec.of_constants(inputs["codes"].shape[2], attributes, held)
    rows, columns, planes, groups = (spec.sizes[letter] for letter in "NKPG")
    levels, units = integer_levels(inputs["levels"][:planes].astype(np.float32))
    units = np.concatenate([units, np.ones(int(spec.has_offset), np.float32)])
    values = _values(inputs, units, spec)  # (N, G, Q)
    if spec.group > LARGEST_GROUP:
        raise ValueError(f"a group of {spec.group} inputs is too long for int8; the longest is {LARGEST_GROUP}")
    x = inputs["x"].astype(np.float32).reshape(-1, groups, spec.group)
    q, scale = quantize(x)
    codes = layout.unpack_codes(layout.from_carrier(inputs["codes"].astype(np.int8)), rows, columns)
    total = np.zeros((len(q), rows), np.float32)
    products = [_dots(q, levels[plane][codes]) for plane in range(planes)]  # each (G, M, N)
    if spec.has_offset:
        products.append(_dots(q, np.ones((rows, columns), np.int32)))
    for group in range(groups):
        for plane, product in enumerate(products):
            total = fused(product[group] * scale[:, group, None], values[None, :, group, plane], total)
    if spec.branch_rank:
        total = _add_branch(inputs, q, scale, total, spec.factors)
    y = (total + inputs["bias"].astype(np.float32)).astype(inputs["x"].dtype)
    result: Array = y.reshape(*inputs["x"].shape[:-1], rows)
    return result


def _dots(q: npt.NDArray[np.int8], weight: npt.NDArray[np.int32]) -> FloatArray:
    """Return the dot products (G, M, N) of (M, G, K / G) with (N, K), as float32."""
    grouped = weight.reshape(len(weight), q.shape[1], -1).astype(np.float64)
    exact: DoubleArray = q.astype(np.float64).transpose(1, 0, 2) @ grouped.transpose(1, 2, 0)  # below 2**53
    return exact.astype(np.float32)


def _values(inputs: Mapping[str, Array], units: FloatArray, spec: LayerSpec) -> FloatArray:
    stored, step, base = (inputs[name].astype(np.float32) for name in ("params", "step", "base"))
    if spec.params is not Form.INT8:  # the parameters themselves are in step, their factor in params
        stored, step = step, stored
    values = fused(stored, step * units[:, None], base * units[:, None])
    return layout.unpack_rows(values, spec.out_features).astype(np.float32)


def _add_branch(
    inputs: Mapping[str, Array], q: npt.NDArray[np.int8], scale: FloatArray, total: FloatArray, form: Form
) -> FloatArray:
    down, down_scale = inputs["down"], inputs["down_scale"].astype(np.float32)
    up, up_scale = inputs["up"].astype(np.float32), inputs["up_scale"].astype(np.float32)
    if form is not Form.INT8:
        down, down_scale = quantize(down_scale * down.astype(np.float32))
        down_scale = down_scale[:, None]
        up, up_scale = up_scale * up, np.ones((1, up_scale.shape[1]), np.float32)
    products = _dots(q, down.astype(np.int32))
    ranks = np.zeros(products.shape[1:], np.float32)
    for group, product in enumerate(products):
        ranks = ranks + product * scale[:, group, None]
    ranks = ranks * (down_scale[:, 0] * up_scale[0])
    for rank in range(ranks.shape[1]):
        total = fused(ranks[:, rank, None], up[None, :, rank], total)
    return total
