"""What a format of another tool is, and how its integers, scales and tables become records without a change.

Letters of shapes: N out features, K in features, G groups of a row.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rankbook.calibration.notes import note
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
class Numbers:
    """What a layer of another tool is made of: codes, and the numbers by which they become weights.

    Without levels the weight is ``plane * (code - zero)``, with one plane; with levels it is the sum over planes of
    ``plane * level[code]``, plus the offset where the planes are one more than the levels.

    Attributes:
        codes: (N, K) uint8, below ``2**bits``.
        bits: 2 to 8.
        planes: Coefficients (N, G) of each plane in any floating dtype, then the offset if there is one.
        method: What the record says that it was made with.
        zeros: (N, G) integers, or one for all.
        levels: (P, 2**b) int8 or float16, or None.
        octaves: Whether the coefficients are powers of two, which 8 bits may hold.
        factors: (N,) float32 that the one plane, of numbers in E4M3, is multiplied by; or None.
    """

    codes: Tensor
    bits: int
    planes: Sequence[Tensor]
    method: str
    zeros: Tensor | int = 0
    levels: Tensor | None = None
    octaves: bool = False
    factors: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Numbers]) -> Numbers:
        """Put the rows of layers below each other: the matrices of experts, gate and up.

        Raises:
            ImportRefusedError: They differ in bits, groups or levels.
        """
        first = parts[0]
        if len(parts) == 1:
            return first
        shapes = {(p.bits, p.method, p.codes.shape[1], *(plane.shape[1] for plane in p.planes)) for p in parts}
        levels = {None if part.levels is None else tuple(part.levels.flatten().tolist()) for part in parts}
        if len(shapes) > 1 or len(levels) > 1:
            raise ImportRefusedError(
                "it is quantized in another way than the matrices that lie in one tensor of the model with it; experts"
                " of one block need the same bits and groups"
            )
        zeros: Tensor | int = first.zeros
        if any(isinstance(part.zeros, Tensor) or part.zeros != zeros for part in parts):
            each = (torch.as_tensor(part.zeros).expand(part.planes[0].shape) for part in parts)
            zeros = torch.cat(list(each))
        planes = [torch.cat(list(plane)) for plane in zip(*(part.planes for part in parts), strict=True)]
        octaves = all(part.octaves for part in parts)
        codes = torch.cat([part.codes for part in parts])
        factors = [part.factors for part in parts if part.factors is not None]
        if factors and len(factors) < len(parts):
            raise ImportRefusedError("some of the parts that lie in it have a factor for their scales, and others none")
        whole = torch.cat(factors) if factors else None
        return replace(first, codes=codes, planes=planes, zeros=zeros, octaves=octaves, factors=whole)

    def ordered(self, rows: Tensor) -> Numbers:
        """Return the same with rows in another order, int64 (N,)."""
        zeros = self.zeros[rows] if isinstance(self.zeros, Tensor) else self.zeros
        factors = None if self.factors is None else self.factors[rows]
        planes = [plane[rows] for plane in self.planes]
        return replace(self, codes=self.codes[rows], planes=planes, zeros=zeros, factors=factors)

    def record(self) -> QuantizedLinear:
        """Return the record, whose decoded float32 weight is exactly the definition's; see `records`."""
        return self.records(1)[0]

    def records(self, count: int) -> list[QuantizedLinear]:
        """Return the records of ``count`` layers whose rows lie below each other, all stored in one form.

        One zero point for all groups goes into the levels, and coefficients stay in 16 bits where float16 holds every
        one. Others stay in 8 bits beside a scale in float16; with other scales they become offsets in float32. So do
        scales in E4M3 if each panel of 32 rows has one factor.

        Raises:
            ImportRefusedError: Scales that are not finite, or groups that do not cut the rows evenly.
        """
        codes, levels, planes, zeros = self._by_levels()
        groups = [_regrouped(plane.double(), codes.shape[1]) for plane in planes]
        params = None
        if zeros is not None:
            params = _zero_points(groups[0], _regrouped(zeros, codes.shape[1]), count)
        elif self.factors is not None:
            params = _e4m3_scales(groups[0], self.factors, count)
            groups = [(groups[0].float() * self.factors[:, None]).double()]
        params = params or exact_params(torch.stack(list(torch.stack(groups, -1).chunk(count))), octaves=self.octaves)
        return [
            QuantizedLinear(
                codes=part.contiguous(),
                bits=int(math.log2(levels.shape[1])),
                levels=levels.clone(),  # tensors that two layers hold would be stored once
                params=held,
                has_offset=len(planes) > len(levels),
                method=self.method,
            )
            for part, held in zip(codes.chunk(count), params, strict=True)
        ]

    def _by_levels(self) -> tuple[Tensor, Tensor, Sequence[Tensor], Tensor | None]:
        """Return codes, levels and planes of the record, and the zero points that its offset is made of."""
        if self.levels is not None:
            return self.codes, self.levels, self.planes, None
        codes, zeros, scales = self.codes, self.zeros, self.planes[0].double()
        width = self.bits if self.bits in layout.BITS else WIDE
        limit = LEVEL_LIMIT[width]
        if isinstance(zeros, Tensor) and bool((zeros == zeros.flatten()[0]).all()):
            zeros = int(zeros.flatten()[0])
        if isinstance(zeros, int) and -limit <= -zeros and (1 << self.bits) - 1 - zeros <= limit - 1:
            if width == WIDE:  # every int8 is a level
                codes, zeros = (codes.short() - zeros + limit).to(torch.uint8), limit
            return codes, (torch.arange(1 << width) - zeros).to(torch.int8)[None], [scales], None
        first = limit if width == WIDE else 0
        levels = (torch.arange(1 << width) - first).to(torch.int8)[None]
        points = torch.as_tensor(zeros - first).expand(scales.shape)
        return codes, levels, [scales, -scales * points], points


@dataclass(frozen=True)
class Format:
    """How another tool stores layers: one module of `formats` that ends in ``FORMAT = Format(...)``.

    Attributes:
        name: What reports and the manifest call it.
        title: What people call it.
        claims: Whether the quantization entry of a config.json is of this format.
        mark: Last part of the names by which its layers are known: a layer is what has ``<layer>.<mark>``.
        numbers: ``numbers(tensors, entry)`` returns what one layer is made of, from its tensors by the rest of their
            names and the quantization entry of config.json.
        check: ``check(entry)`` raises `ImportRefusedError` for what no layer of the checkpoint could be imported with.
        joint: What stands between the name of a layer and the rest; ``_`` for parameters of experts.
    """

    name: str
    title: str
    claims: Callable[[Mapping[str, object]], bool]
    mark: str
    numbers: Callable[[Mapping[str, Tensor], Mapping[str, object]], Numbers]
    check: Callable[[Mapping[str, object]], None] = lambda _: None
    joint: str = "."


def say_rounding(*, inputs: bool, cache: bool = False) -> None:
    """Say what of a source is not taken over: that it rounds the inputs of its layers, or its cache."""
    if inputs:
        note("the source rounds the inputs of its layers as well; the weights alone are imported")
    if cache:
        note("the source rounds its cache as well; the weights alone are imported (--kv-bits rounds it anew)")


def exact_params(values: Tensor, *, octaves: bool = False) -> list[GroupParams]:
    """Return the numbers of groups of layers (E, N, G, Q) in the smallest form that holds each of them exactly.

    Args:
        values: In any dtype.
        octaves: They are powers of two: 8 bits hold them where those of a panel of 32 rows lie within seven octaves.

    Raises:
        ImportRefusedError: float32 does not hold them, or they are not finite.
    """
    if not is_finite(values):
        raise ImportRefusedError("its scales hold NaN or infinity; the checkpoint is damaged, download it again")
    if octaves:
        small = [GroupParams.powers_of_two(part.log2()) for part in values]
        if all(torch.equal(held.dense().double(), part.double()) for held, part in zip(small, values, strict=True)):
            return small
    for dtype in (torch.float16, torch.float32):
        stored = values.to(dtype)
        if torch.equal(stored.double(), values.double()):
            return [GroupParams(values=part.contiguous()) for part in stored]
    raise ImportRefusedError("float32 does not hold its scales exactly; dequantize it with its own tool")


def _zero_points(scales: Tensor, points: Tensor, count: int) -> list[GroupParams] | None:
    """Return scales and zero points (N, G) of layers below each other; None where float16 does not hold the scales."""
    stored, small = scales.half()[..., None], points.to(torch.int8)[..., None]
    if not torch.equal(stored[..., 0].double(), scales) or not torch.equal(small[..., 0].double(), points.double()):
        return None
    pairs = zip(small.chunk(count), stored.chunk(count), strict=True)
    return [GroupParams(zero.contiguous(), values=scale.contiguous(), compact="zeros") for zero, scale in pairs]


def _e4m3_scales(scales: Tensor, factors: Tensor, count: int) -> list[GroupParams] | None:
    """Return scales (N, G) in E4M3 with factors (N,); None where they are others, or a panel has more than one."""
    stored = scales.to(torch.float8_e4m3fn)
    if not torch.equal(stored.double(), scales) or not is_finite(stored):
        return None
    found = []
    for part, own in zip(stored.view(torch.int8).chunk(count), factors.chunk(count), strict=True):
        step = own[:: layout.PANEL, None].contiguous()
        if not torch.equal(step.repeat_interleave(layout.PANEL, 0)[: len(own), 0], own):
            return None
        found.append(GroupParams(part[..., None].contiguous(), step, torch.zeros_like(step), compact="e4m3"))
    return found


def unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return integers (A, count) uint8 of ``bits`` that lie one behind the other in the bits of rows, lowest first.

    Args:
        packed: (A, B) int32 or uint8.
        bits: 1 to 8.
        count: Integers of a row; what is left of it is padding.

    Raises:
        ImportRefusedError: The rows are too short, or no integers.
    """
    if packed.dtype not in (torch.int32, torch.uint8) or packed.ndim != 2:
        raise ImportRefusedError(f"its codes are {packed.dtype} {tuple(packed.shape)}, not packed integers in int32")
    stream = np.unpackbits(np.ascontiguousarray(packed.cpu().numpy()).view(np.uint8), axis=1, bitorder="little")
    if stream.shape[1] < count * bits:
        raise ImportRefusedError(
            f"its codes {tuple(packed.shape)} hold {stream.shape[1] // bits} integers of {bits} bits a row, not"
            f" {count}; the checkpoint is damaged, or its configuration is another's"
        )
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
