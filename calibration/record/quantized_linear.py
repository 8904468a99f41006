"""The central record: one quantized linear layer, whatever method made it.

Letters: N out features, K in features, G groups, P planes (the rank of the codebook matrix), Q parameter planes
(P, or P + 1 with an offset), R rank of the error branch, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankbook.calibration.record import halves
from rankbook.calibration.record.group_params import GroupParams, check_finite, check_tensor
from rankbook.plugins import layout
from rankbook.plugins.forms import Form
from rankbook.plugins.layer_spec import LayerSpec, check_group

__all__ = ["LEVEL_LIMIT", "Factor", "GroupParams", "LowRank", "QuantizedLinear"]

_AT_ONCE = 1 << 22
"""Weights decoded at a time."""
LEVEL_LIMIT = {2: 64, 3: 64, 4: 64, 8: 128}
"""Integer levels lie in [-limit, limit - 1]: 7 bits are exact in every kernel, 8-bit codes need all 256 levels."""


@dataclass(frozen=True)
class Factor:
    """One factor of the error branch: ``values``, or int8 ``codes`` with one scale per rank.

    Attributes:
        codes: (rows, columns) int8, or None.
        scale: Broadcastable to codes, float32, or None.
        values: (rows, columns) float16 or float32, or None.
    """

    codes: Tensor | None = None
    scale: Tensor | None = None
    values: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.codes is None or self.scale is None):
            raise ValueError("a factor needs either codes and scale, or values; give exactly one form")
        for name, numbers in (("scale", self.scale), ("values", self.values)):
            check_finite(f"factor {name}", numbers)

    @classmethod
    def quantize(cls, values: Tensor, bits: int, rank_axis: int) -> Factor:
        """Store a factor in ``bits``: 8 (symmetric, one scale per entry of ``rank_axis``), 16 or 32.

        Of 16 bits, float32 is taken where float16 does not hold it (`rankbook.calibration.record.halves`).

        Raises:
            ValueError: Another number of bits.
        """
        if bits == 16:
            return cls(values=halves.stored(values, axis=rank_axis))
        if bits == 32:
            return cls(values=values.float().contiguous())
        if bits != 8:
            raise ValueError(f"error-branch factors in {bits} bits are not supported; choose 8, 16 or 32")
        peak = values.float().abs().amax(1 - rank_axis, keepdim=True)
        scale = (peak / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return cls((values.float() / scale).round().clamp(-127, 127).to(torch.int8), scale)

    @property
    def form(self) -> Form:
        """How it is stored."""
        return Form.INT8 if self.values is None else Form(8 * self.values.element_size())

    @property
    def shape(self) -> torch.Size:
        """(rows, columns)."""
        return (self.codes if self.values is None else self.values).shape  # type: ignore[union-attr]

    def dense(self) -> Tensor:
        """Return the factor as float32 (rows, columns)."""
        if self.codes is not None and self.scale is not None:
            return self.codes.float() * self.scale
        return self.values.float()  # type: ignore[union-attr]

    def pack(self, name: str) -> dict[str, Tensor]:
        """Return the parts of factor ``name`` (``down`` or ``up``) that hold data, see `LayerSpec.tensors`."""
        if self.codes is not None and self.scale is not None:
            return {name: self.codes, f"{name}_scale": self.scale}
        return {f"{name}_scale": self.values}  # type: ignore[dict-item]

    @classmethod
    def unpack(cls, name: str, tensors: Mapping[str, Tensor], form: Form) -> Factor:
        """Undo `pack`."""
        scale = tensors[f"{name}_scale"]
        return cls(tensors[name], scale) if form is Form.INT8 else cls(values=scale)


@dataclass(frozen=True)
class LowRank:
    """The error branch: adds ``(x @ down.T) @ up.T`` (LQER, Zhang et al. 2024, equation 7).

    Attributes:
        down: (R, K).
        up: (N, R).
    """

    down: Factor
    up: Factor

    def __post_init__(self) -> None:
        if self.down.shape[0] != self.up.shape[1]:
            raise ValueError(f"down has rank {self.down.shape[0]} and up has rank {self.up.shape[1]}; they must agree")
        if self.down.form is not self.up.form:
            raise ValueError(f"down is {self.down.form.dtype} and up {self.up.form.dtype}; both must have one form")

    @classmethod
    def joined(cls, down: Factor, up: Factor) -> LowRank:
        """Join two factors; where only one could be stored in float16, both are in float32."""
        if {down.form, up.form} == {Form.FLOAT16, Form.FLOAT32}:
            down, up = Factor(values=down.dense()), Factor(values=up.dense())
        return cls(down, up)

    @property
    def branch_rank(self) -> int:
        """R."""
        return int(self.down.shape[0])

    def dense(self) -> Tensor:
        """Return ``up @ down``, float32 (N, K)."""
        return self.up.dense() @ self.down.dense()


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear layer whose weight is looked up in one codebook per group.

    ``codebook[n, g, c] = sum_p coeffs[n, g, p] * levels[p, c] + offset[n, g]`` and ``w[n, k] = codebook[n, k // group,
    codes[n, k]]``: the codebooks of all groups form a matrix of rank P plus an offset (LCQ, Cai et al. 2024, ``C =
    S^T V - B`` with coeffs = S, levels = V, offset = -B).

    Attributes:
        codes: (N, K) uint8, each below ``2**bits``.
        bits: 2, 3, 4 or 8.
        levels: (P, 2**bits) int8 within `LEVEL_LIMIT`, or float16.
        params: Coefficients of the P planes and, with ``has_offset``, the offset: (N, G, P or P + 1).
        has_offset: Whether the last plane of ``params`` is the offset.
        bias: (N,) or None.
        low_rank: The error branch, or None.
        method: Name of the method that made the record.
    """

    codes: Tensor
    bits: int
    levels: Tensor
    params: GroupParams
    has_offset: bool
    bias: Tensor | None = None
    low_rank: LowRank | None = None
    method: str = ""

    def __post_init__(self) -> None:
        if self.bits not in layout.BITS:
            raise ValueError(f"{self.bits} bits per code are not supported; choose one of {layout.BITS}")
        check_tensor("codes", self.codes, (torch.uint8,), 2)
        if self.codes.numel() == 0 or int(self.codes.max()) >= 1 << self.bits:
            raise ValueError(f"codes must be non-empty and below {1 << self.bits} for {self.bits} bits")
        self._check_levels()
        check_group(self.in_features, self.group)
        rows, groups, planes = self.params.shape
        if rows != self.out_features or groups * self.group != self.in_features:
            raise ValueError(
                f"params have shape {tuple(self.params.shape)}; codes have shape {tuple(self.codes.shape)}"
            )
        if planes != self.planes + self.has_offset:
            raise ValueError(
                f"params have {planes} planes; {self.planes} rows of levels"
                f"{' and an offset' if self.has_offset else ''} ask for {self.planes + self.has_offset}"
            )
        if self.bias is not None and tuple(self.bias.shape) != (rows,):
            raise ValueError(f"bias has shape {tuple(self.bias.shape)}; it must be ({rows},)")
        check_finite("bias", self.bias)
        if self.low_rank is not None and (
            self.low_rank.up.shape[0] != rows or self.low_rank.down.shape[1] != self.in_features
        ):
            raise ValueError("the error branch does not fit the layer: up must be (N, R) and down (R, K)")

    def _check_levels(self) -> None:
        check_tensor("levels", self.levels, (torch.int8, torch.float16), 2)
        if self.levels.shape[1] != 1 << self.bits:
            raise ValueError(f"levels have {self.levels.shape[1]} columns; {self.bits} bits ask for {1 << self.bits}")
        limit = LEVEL_LIMIT[self.bits]
        if self.levels.dtype == torch.int8 and (self.levels.min() < -limit or self.levels.max() > limit - 1):
            raise ValueError(f"integer levels must lie in [{-limit}, {limit - 1}] for {self.bits} bits")
        check_finite("levels", self.levels)

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.codes.shape[1])

    @property
    def planes(self) -> int:
        """P, the rank of the codebook matrix without its offset."""
        return int(self.levels.shape[0])

    @property
    def group(self) -> int:
        """Weights of one row that share a codebook."""
        return self.in_features // max(1, int(self.params.shape[1]))

    def codebooks(self) -> Tensor:
        """Return the codebooks of all groups, float32 (N, G, 2**bits)."""
        params = self.params.dense()
        books = params[..., : self.planes] @ self.levels.float()
        return books + params[..., self.planes :] if self.has_offset else books

    def weight(self, *, with_low_rank: bool = False) -> Tensor:
        """Return the decoded weight, float32 (N, K), optionally with the error branch folded in."""
        grouped = self.codes.view(self.out_features, -1, self.group)
        books = self.codebooks()
        weight = books.new_empty(grouped.shape)
        some = max(1, _AT_ONCE // self.in_features)
        for begin in range(0, self.out_features, some):  # indexes take eight bytes each
            part = slice(begin, begin + some)
            torch.gather(books[part], 2, grouped[part].long(), out=weight[part])
        weight = weight.view(self.out_features, self.in_features)
        if with_low_rank and self.low_rank is not None:
            weight += self.low_rank.dense()
        return weight

    def with_low_rank(self, low_rank: LowRank | None) -> QuantizedLinear:
        """Return the record with another error branch."""
        return replace(self, low_rank=low_rank)

    def spec(self, kind: str = "linear", *, scale: float = 1.0, shared_with: str = "") -> LayerSpec:
        """Return the description of the packed layer."""
        return LayerSpec(
            kind=kind,
            method=self.method,
            bits=self.bits,
            out_features=self.out_features,
            in_features=self.in_features,
            group=self.group,
            planes=self.planes,
            has_offset=self.has_offset,
            params=self.params.form,
            compact=self.params.compact,
            level_dtype=_dtype_name(self.levels),
            bias="" if self.bias is None else _dtype_name(self.bias),
            branch_rank=0 if self.low_rank is None else self.low_rank.branch_rank,
            factors=Form.INT8 if self.low_rank is None else self.low_rank.down.form,
            scale=scale,
            shared_with=shared_with,
        )

    def bits_per_weight(self) -> float:
        """Return stored bits per original weight, every side datum counted, bias left out (it is not quantized)."""
        return self.spec().bits_per_weight()

    def pack(self) -> dict[str, Tensor]:
        """Return the packed tensors of `LayerSpec.tensors`, which checkpoints and torch modules hold, on the CPU."""
        held = {
            "codes": torch.from_numpy(layout.pack_codes(self.codes.cpu().numpy(), self.bits)),
            "levels": self.levels,
        }
        held |= self.params.pack()
        if self.bias is not None:
            held["bias"] = self.bias
        if self.low_rank is not None:
            for name, factor in (("down", self.low_rank.down), ("up", self.low_rank.up)):
                held |= factor.pack(name)
        for name, part in self.spec().tensors().items():
            if part.value is not None:
                held[name] = torch.full(part.shape, part.value, dtype=getattr(torch, part.dtype))
        return {name: tensor.cpu().contiguous() for name, tensor in held.items()}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedLinear:
        """Undo `pack`.

        Args:
            tensors: The packed tensors, as `LayerSpec.check` accepts them, on any device; the record is there too.
            spec: Their description.

        Raises:
            ValueError: Tensors that do not belong to the layer.
            KeyError: A tensor is missing.
        """
        codes = layout.unpack_codes(tensors["codes"].cpu().numpy(), spec.out_features, spec.in_features)
        low_rank = None
        if spec.branch_rank:
            low_rank = LowRank(*(Factor.unpack(name, tensors, spec.factors) for name in ("down", "up")))
        return cls(
            codes=torch.from_numpy(codes).to(tensors["codes"].device),
            bits=spec.bits,
            levels=tensors["levels"],
            params=GroupParams.unpack(tensors, spec),
            has_offset=spec.has_offset,
            bias=tensors["bias"] if spec.bias else None,
            low_rank=low_rank,
            method=spec.method,
        )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
