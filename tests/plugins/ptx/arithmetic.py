"""Numbers: what arithmetic instructions compute, lane by lane.

Sums of fp16 and fused multiply-adds are computed in float64 and rounded once more; that differs from one rounding in
rare halfway cases, by one unit in the last place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.plugins.ptx.parser import Instruction, PtxError

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]
DTYPES: dict[str, Any] = {
    **{f"{kind}{bits}": f"{kind}{bits // 8}" for kind in "u" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "u2": "u2", "u4": "u4",
    "f16": "f2", "f32": "f4", "f64": "f8", "f16x2": "u4",
}  # fmt: skip
"""numpy's name of each type; two halves in a word are seen as the word."""

_ORDERED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge
}  # fmt: skip


def comparison(relation: str, type_: str) -> Function | None:
    """Return the comparison ``relation`` of ``setp``, or None if it is not known."""
    if relation in _ORDERED:
        plain = _ORDERED[relation]
        if type_.startswith("f") and relation == "ne":  # false where one is NaN, unlike in numpy
            return lambda a, b: (a < b) | (a > b)
        return lambda a, b: np.asarray(plain(a, b))
    if type_.startswith("f") and relation.endswith("u") and relation[:-1] in _ORDERED:
        base = _ORDERED[relation[:-1]]
        return lambda a, b: np.asarray(base(a, b)) | np.isnan(a) | np.isnan(b)
    if type_.startswith("f") and relation == "nan":
        return lambda a, b: np.asarray(np.isnan(a) | np.isnan(b))
    return None


def function(instruction: Instruction) -> tuple[Function, list[str]]:
    """Return what an arithmetic instruction computes and the types of its operands.

    Raises:
        PtxError: The instruction is not known.
    """
    *form, type_ = instruction.modifiers or ("",)
    key = ".".join([instruction.opcode, *form])
    kind = "" if type_ == "f16x2" else "pred" if type_ == "pred" else type_[:1]
    found = _FUNCTIONS.get((f"{key}.{type_}", "")) or _FUNCTIONS.get((key, kind))
    if found is None or (type_ not in DTYPES and type_ != "pred"):
        raise instruction.error("the instruction is not known")
    computed, operands = found
    return computed, [type_ if name == "=" else name for name in operands]


def _float_function(computed: Callable[..., Any]) -> Function:
    return lambda *arguments: np.asarray(computed(*(x.astype(np.float64) for x in arguments))).astype(
        arguments[0].dtype
    )


def _multiply_wide(a: Array, b: Array) -> Array:
    wide = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(wide) * b.astype(wide)


def _multiply_high(a: Array, b: Array) -> Array:
    return (_multiply_wide(a, b) >> (8 * a.dtype.itemsize)).astype(a.dtype)


def _divide(a: Array, b: Array) -> Array:
    """Quotient rounded towards zero. Division by zero gives garbage that only lanes outside the mask may see."""
    b = np.where(b == 0, np.ones_like(b), b)
    quotient: Array = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), np.zeros_like(a))


def _shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted: Array = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, np.zeros_like(a))


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros(1, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte >> np.uint32(7) != 0, np.uint32(255), np.uint32(0))
        out = out | (np.where(nibble > 7, sign, byte) << np.uint32(8 * i))
    return out


def _extract(a: Array, start: Array, length: Array) -> Array:
    """Bits ``start`` .. ``start + length``, of a signed type with their sign. Within the word only."""
    if ((start + length) > 8 * a.dtype.itemsize).any() or (length == 0).any():
        raise PtxError("bfe of bits outside the word")
    unused = (np.uint32(8 * a.dtype.itemsize) - start - length).astype(a.dtype)
    return (a << unused) >> (unused + start.astype(a.dtype))


def _insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32) << start
    return (b & ~mask) | ((a << start) & mask)


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit by bit, the bit of ``table`` whose number the bits of a, b and c make."""
    out = np.zeros(1, np.uint32)
    for row in range(8):
        chosen = [x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
        out = out | np.where((table >> np.uint32(row)) & np.uint32(1) != 0, chosen[0] & chosen[1] & chosen[2], out)
    return out


def halves(words: Array) -> Array:
    """Return the two fp16 numbers of every word, (lanes, 2) float64."""
    return np.ascontiguousarray(words).view(np.float16).reshape(-1, 2).astype(np.float64)


def _fma_halves(a: Array, b: Array, c: Array) -> Array:
    return (halves(a) * halves(b) + halves(c)).astype(np.float16).view(np.uint32)[:, 0]


def to_bfloat(values: Array) -> Array:
    """Return the bits of bfloat16, rounded to nearest even. NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _to_int(whole: Array) -> Array:
    """Whole numbers as int32: the nearest one that it has, 0 for NaN."""
    return np.nan_to_num(whole.astype(np.float64), nan=0.0).clip(-(2.0**31), 2.0**31 - 1).astype(np.int32)


def conversion(instruction: Instruction) -> Function:
    """Return what a ``cvt`` does.

    Raises:
        PtxError: The conversion is not known.
    """
    *rounding, target, source = instruction.modifiers
    if (target, source) == ("s32", "f32") and rounding in (["rni"], ["rzi"]):
        to_whole = np.rint if rounding == ["rni"] else np.trunc
        return lambda values: _to_int(to_whole(values))
    to_float, from_float = target in ("f16", "f32"), source in ("f16", "f32")
    if target in ("f16x2", "bf16x2") and rounding == ["rn"] and source == "f32":
        narrow = to_bfloat if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return lambda high, low: narrow(low).astype(np.uint32) | (narrow(high).astype(np.uint32) << np.uint32(16))
    if target == "bf16" and rounding == ["rn"] and source == "f32":
        return to_bfloat
    widens = target == "f32" and source == "f16" and not rounding
    rounds = to_float and rounding == ["rn"] and (not from_float or source == "f32")
    whole = target in DTYPES and source in DTYPES and not (to_float or from_float or rounding)
    if not (widens or rounds or whole):
        raise instruction.error("the conversion is not known")
    return lambda values: values.astype(DTYPES[target])


def _numbers_of(words: Sequence[Array], widen: Function) -> list[Array]:
    """(warps, 8, 4 n) numbers per register with n numbers: lane 4 g + t holds row g, columns n t to n t + n - 1."""
    warps = len(words[0]) // 32
    return [widen(np.ascontiguousarray(word)).reshape(warps, 8, -1) for word in words]


def multiply_fragments(
    a: Sequence[Array], b: Sequence[Array], c: Sequence[Array], widen: Function
) -> tuple[Array, Array, Array, Array]:
    """Return d = a b + c, fragments as in the PTX manual: of m16n8k16 with 16-bit floats, of m16n8k32 with bytes.

    float64 holds every sum of products of bytes; sums leave 32 bits as they do in the instruction, without a word.
    """
    a0, a1, a2, a3 = _numbers_of(a, widen)
    left = np.concatenate([np.concatenate([a0, a2], 2), np.concatenate([a1, a3], 2)], 1)  # (warps, 16 rows, k)
    right = np.concatenate(_numbers_of(b, widen), 2)  # (warps, 8 columns, k)
    product = (left @ right.transpose(0, 2, 1)).reshape(-1, 2, 8, 4, 2)  # warps, upper or lower, g, t, column
    d = [product[:, i // 2, :, :, i % 2].reshape(-1) + c[i] for i in range(4)]
    narrow = (lambda x: x.astype(np.int64).astype(np.int32)) if c[0].dtype.kind == "i" else lambda x: x.astype("f4")
    d0, d1, d2, d3 = map(narrow, d)
    return d0, d1, d2, d3


def _from_bfloat(words: Array) -> Array:
    return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


MMA_FORMS: dict[tuple[str, ...], Function] = {
    ("m16n8k16", "row", "col", "f32", "f16", "f16", "f32"): lambda words: words.view(np.float16).astype(np.float64),
    ("m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"): _from_bfloat,
    ("m16n8k32", "row", "col", "s32", "s8", "s8", "s32"): lambda words: words.view(np.int8).astype(np.float64),
}
"""Shapes and types of mma, and the numbers in a word of its factors."""


def _table() -> dict[tuple[str, str], tuple[Function, list[str]]]:
    """Functions and types of their operands ("=": the instruction's) by form and kind of type."""
    two, three = ["=", "="], ["=", "=", "="]
    integer: dict[str, tuple[Function, list[str]]] = {
        "add": (operator.add, two), "sub": (operator.sub, two), "neg": (operator.neg, ["="]),
        "mul.lo": (operator.mul, two), "mul.hi": (_multiply_high, two), "mul.wide": (_multiply_wide, two),
        "mad.lo": (lambda a, b, c: a * b + c, three),
        "div": (_divide, two), "rem": (lambda a, b: a - _divide(a, b) * b, two),
        "min": (np.minimum, two), "max": (np.maximum, two), "abs": (np.abs, ["="]),
        "shl": (_shift_left, ["=", "u32"]), "shr": (_shift_right, ["=", "u32"]),
        "and": (operator.and_, two), "or": (operator.or_, two), "xor": (operator.xor, two), "not": (np.invert, ["="]),
        "bfe": (_extract, ["=", "u32", "u32"]), "bfi": (_insert, ["=", "=", "u32", "u32"]),
    }  # fmt: skip
    floats: dict[str, tuple[Function, list[str]]] = {
        "add": (operator.add, two), "sub": (operator.sub, two), "mul": (operator.mul, two),
        "add.rn": (operator.add, two), "mul.rn": (operator.mul, two), "div.rn": (operator.truediv, two),
        "fma.rn": (_float_function(lambda a, b, c: a * b + c), three), "abs": (np.abs, ["="]),
        "min": (np.fmin, two), "max": (np.fmax, two), "neg": (operator.neg, ["="]),
    }  # fmt: skip
    logic = {name: integer[name] for name in ("and", "or", "xor", "not")}
    table = {(name, kind): entry for kind in "usb" for name, entry in integer.items()}
    table |= {(name, "f"): entry for name, entry in floats.items()}
    table |= {(name, "pred"): entry for name, entry in logic.items()}
    table[("prmt", "b")] = (_permute, three)
    table[("lop3", "b")] = (_logic, ["=", "=", "=", "u32"])
    table[("fma.rn.f16x2", "")] = (_fma_halves, three)
    return table


_FUNCTIONS = _table()
