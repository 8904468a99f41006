"""What a format of another tool is, and how its integers, scales and tables become records without a change.

Letters of shapes: N out features, K in features, G groups of a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rankbook.calibration.record.finite import is_finite
from rankbook.calibration.record.group_params import GroupParams
from rankbook.calibration.record.quantized_linear import LEVEL_LIMIT, QuantizedLinear
from rankbook.plugins import layout
from rankbook.plugins.layer_spec import allowed_groups

WIDE = 8
"""Bits of the codes that hold integers of a width without codes of its own (5, 6 or 7 bits)."""


class ImportRefusedError(ValueError):
    """A layer that a record cannot hold without a change; the message says why and what to do."""


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a reader of a format stumbles over in damaged files into one sentence.

    Raises:
        ImportRefusedError: The block raised; what it refused itself passes as it is.
    """
    try:
        yield
    except ImportRefusedError:
        raise
    except (AttributeError, ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise ImportRefusedError(f"{what} is not as the format has it ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Format:
    """How another tool stores layers: one module of `formats` that ends in ``FORMAT = Format(...)``.

    Attributes:
        name: What reports and the manifest call it.
        title: What people call it.
        claims: Whether the quantization entry of a config.json is of this format.
        mark: Last part of the names by which its layers are known: a layer is what has ``<layer>.<mark>``.
        record: ``record(tensors, entry)`` returns the record of one layer, without its bias, from its tensors by the
            rest of their names and the quantization entry of config.json.
        check: ``check(entry)`` raises `ImportRefusedError` for what no layer of the checkpoint could be imported with.
    """

    name: str
    title: str
    claims: Callable[[Mapping[str, object]], bool]
    mark: str
    record: Callable[[Mapping[str, Tensor], Mapping[str, object]], QuantizedLinear]
    check: Callable[[Mapping[str, object]], None] = lambda _: None


def affine(codes: Tensor, bits: int, scales: Tensor, zeros: Tensor | int, method: str) -> QuantizedLinear:
    """Return the record of ``weight = scale * (code - zero)``, whose decoded float32 weight is exactly that.

    One zero point for all groups goes into the levels, and scales stay in 16 bits where float16 holds them. Others
    become offsets: ``scale * zero`` has more digits than float16 and is stored in float32.

    Args:
        codes: (N, K) uint8, below ``2**bits``.
        bits: 2 to 8.
        scales: (N, G) of any floating dtype.
        zeros: (N, G) integers, or one for all.
        method: What the record says that it was made with.

    Raises:
        ImportRefusedError: Scales that are not finite, or groups that do not cut the rows evenly.
    """
    width = bits if bits in layout.BITS else WIDE
    if isinstance(zeros, Tensor) and bool((zeros == zeros.flatten()[0]).all()):
        zeros = int(zeros.flatten()[0])
    scales, limit = scales.double(), LEVEL_LIMIT[width]
    if isinstance(zeros, int) and -limit <= -zeros and (1 << bits) - 1 - zeros <= limit - 1:
        if width == WIDE:  # every int8 is a level
            codes, zeros = (codes.short() - zeros + limit).to(torch.uint8), limit
        levels = torch.arange(1 << width) - zeros
        return table(codes, levels.to(torch.int8)[None], [scales], method)
    first = limit if width == WIDE else 0
    levels = (torch.arange(1 << width) - first).to(torch.int8)[None]
    return table(codes, levels, [scales, -scales * (zeros - first)], method, has_offset=True)


def table(
    codes: Tensor, levels: Tensor, planes: list[Tensor], method: str, *, has_offset: bool = False
) -> QuantizedLinear:
    """Return the record of codes that pick from levels, in which every number is what it was.

    Args:
        codes: (N, K) uint8.
        levels: (P, 2**b) int8 or float16.
        planes: Coefficients (N, G) of each plane, then the offset if there is one.
        method: What the record says that it was made with.
        has_offset: Whether the last plane is the offset.

    Raises:
        ImportRefusedError: See `affine`.
    """
    params = torch.stack([_regrouped(plane, codes.shape[1]) for plane in planes], -1)
    return QuantizedLinear(
        codes=codes.contiguous(),
        bits=int(math.log2(levels.shape[1])),
        levels=levels,
        params=exact_params(params),
        has_offset=has_offset,
        method=method,
    )


def exact_params(values: Tensor) -> GroupParams:
    """Return the numbers of groups (N, G, Q) in the smallest floating-point form that holds each of them exactly.

    Raises:
        ImportRefusedError: float32 does not, or they are not finite.
    """
    if not is_finite(values):
        raise ImportRefusedError("its scales hold NaN or infinity; the checkpoint is damaged, download it again")
    for dtype in (torch.float16, torch.float32):
        stored = values.to(dtype)
        if torch.equal(stored.double(), values.double()):
            return GroupParams(values=stored.contiguous())
    raise ImportRefusedError("float32 does not hold its scales exactly; dequantize it with its own tool")


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return integers (A, count) uint8 of ``bits`` that lie one behind the other in the bits of rows, lowest first.

    Args:
        packed: (A, B) int32 or uint8.
        bits: 1 to 8.
        count: Integers of a row; what is left of it is padding.
    """
    stream = np.unpackbits(np.ascontiguousarray(packed.cpu().numpy()).view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : count * bits].reshape(len(stream), count, bits)
    return torch.from_numpy(np.packbits(stream, axis=2, bitorder="little")[..., 0])


def check_order(tensors: Mapping[str, Tensor], name: str, columns: int, groups: int) -> None:
    """Check that columns lie in the order of their groups.

    Raises:
        ImportRefusedError: They were sorted by activation order.
    """
    given = tensors.get(name)
    if given is None or int(given.max()) < 0:  # compressed-tensors fills it with -1 where it says nothing
        return
    if not torch.equal(given.cpu().long(), torch.arange(columns) // math.ceil(columns / groups)):
        raise ImportRefusedError(
            "its columns belong to groups by activation order (desc_act, act-order), and a record's groups are"
            " neighbouring columns: a permutation of the inputs of each layer has no place in it. Take a version that"
            " was quantized with desc_act false, or with GPTQModel's act_group_aware, which keeps most of the gain"
        )


def _regrouped(values: Tensor, columns: int) -> Tensor:
    """Return values of groups (N, G) for the largest groups that a record can have, which lie within those."""
    group, rest = divmod(columns, values.shape[1])
    if rest:
        raise ImportRefusedError(f"its {values.shape[1]} groups do not cut rows of {columns} weights evenly")
    fitting = [size for size in allowed_groups(columns) if group % size == 0]
    if not fitting:
        raise ImportRefusedError(f"its groups have {group} weights; records have groups of multiples of 16")
    return values.repeat_interleave(group // max(fitting), 1)
