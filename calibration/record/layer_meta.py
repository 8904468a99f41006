"""What a reader must know about a packed layer besides its tensors: the entry of one layer in config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.plugins import layout

KINDS = ("linear", "embedding")
"""``y = x @ W.T + bias``, or a lookup of rows of W."""

_DTYPES = {"int8": torch.int8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PARAM_DTYPES = {8: torch.int8, 16: torch.float16, 32: torch.float32}


@dataclass(frozen=True)
class LayerMeta:
    """Shapes and types of one packed layer; with it a module can be built before its tensors are read.

    Letters as in `rankbook.calibration.record.quantized_linear`: N out features (rows of an embedding), K in features.

    Attributes:
        kind: One of `KINDS`.
        method: Name of the method that made the record.
        bits: 2, 3, 4 or 8.
        out_features: N.
        in_features: K.
        group: Weights of a row that share a codebook.
        planes: P, the rank of the codebook matrix without its offset.
        has_offset: Whether the last plane of the parameters is the offset.
        param_bits: 8, 16 or 32 bits for each group parameter.
        level_dtype: ``int8`` or ``float16``.
        bias: Name of the bias' dtype, or empty without one.
        rank: R, the rank of the error branch; 0 without one.
        factor_bits: 8, 16 or 32 bits for the factors of the error branch.
        scale: Factor on the rows an embedding returns (Gemma multiplies them by ``sqrt(hidden)``).
        shared_with: Name of the layer that holds the tensors, empty if it holds its own (tied embeddings).
    """

    kind: str
    method: str
    bits: int
    out_features: int
    in_features: int
    group: int
    planes: int
    has_offset: bool
    param_bits: int = 8
    level_dtype: str = "int8"
    bias: str = ""
    rank: int = 0
    factor_bits: int = 8
    scale: float = 1.0
    shared_with: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"layer kind {self.kind!r} is unknown; choose one of {KINDS}")
        if self.param_bits not in _PARAM_DTYPES or self.factor_bits not in _PARAM_DTYPES:
            raise ValueError(
                f"parameters in {self.param_bits} and factors in {self.factor_bits} bits; allowed are 8, 16, 32"
            )
        if self.level_dtype not in ("int8", "float16") or self.bias not in ("", *_DTYPES):
            raise ValueError(f"level dtype {self.level_dtype!r} or bias dtype {self.bias!r} is unknown")

    @classmethod
    def of(
        cls, record: QuantizedLinear, kind: str = "linear", *, scale: float = 1.0, shared_with: str = ""
    ) -> LayerMeta:
        """Return the meta data of a record."""
        packed = record.pack()
        low_rank = record.low_rank
        values = record.params.values
        meta = cls(
            kind=kind,
            method=record.method,
            bits=record.bits,
            out_features=record.out_features,
            in_features=record.in_features,
            group=record.group,
            planes=record.planes,
            has_offset=record.has_offset,
            param_bits=8 if values is None else 8 * values.element_size(),
            level_dtype=_dtype_name(record.levels.dtype),
            bias="" if record.bias is None else _dtype_name(record.bias.dtype),
            rank=0 if low_rank is None else low_rank.rank,
            factor_bits=_factor_bits(packed),
            scale=scale,
            shared_with=shared_with,
        )
        meta.check(packed)
        return meta

    @classmethod
    def from_json(cls, name: str, entry: Mapping[str, Any]) -> LayerMeta:
        """Read the entry of layer ``name``.

        Raises:
            ValueError: Fields are missing, unknown or wrong.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"layer {name!r} has unknown fields {unknown}; another version of rankbook wrote it")
        try:
            return cls(**entry)
        except TypeError as error:
            raise ValueError(f"layer {name!r} lacks fields: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def template(self) -> dict[str, Tensor]:
        """Return tensors on the ``meta`` device with the names, shapes and dtypes of `QuantizedLinear.pack`."""
        panels = layout.ceil_div(self.out_features, layout.PANEL)
        planes = self.planes + self.has_offset
        params = (panels, self.in_features // self.group, planes, layout.PANEL)
        small = (panels, 1, planes, 1)
        plain = self.param_bits != 8
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": (layout.packed_shape(self.out_features, self.in_features, self.bits), torch.uint8),
            "levels": ((self.planes, 1 << self.bits), _DTYPES[self.level_dtype]),
            "params": ((1, 1, 1, 1) if plain else params, torch.int8),
            "step": (params, _PARAM_DTYPES[self.param_bits]) if plain else (small, torch.float32),
            "base": ((1, 1, 1, 1) if plain else small, torch.float32),
        }
        if self.bias:
            shapes["bias"] = ((self.out_features,), _DTYPES[self.bias])
        if self.rank:
            shapes |= self._factor_shapes()
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}

    def _factor_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        down, up = (self.rank, self.in_features), (self.out_features, self.rank)
        if self.factor_bits != 8:
            dtype = _PARAM_DTYPES[self.factor_bits]
            one = ((1, 1), torch.int8)
            return {"down": one, "down_scale": (down, dtype), "up": one, "up_scale": (up, dtype)}
        scale_down, scale_up = ((self.rank, 1), torch.float32), ((1, self.rank), torch.float32)
        return {"down": (down, torch.int8), "down_scale": scale_down, "up": (up, torch.int8), "up_scale": scale_up}

    def check(self, tensors: Mapping[str, Tensor], name: str = "layer") -> None:
        """Check that packed tensors are those of this layer.

        Raises:
            ValueError: A tensor is missing or has another shape or dtype; the message names it.
        """
        for part, want in self.template().items():
            got = tensors.get(part)
            if got is None:
                raise ValueError(f"{name} lacks the tensor {part!r}; the checkpoint is incomplete, write it again")
            if got.shape != want.shape or got.dtype != want.dtype:
                raise ValueError(
                    f"{name}.{part} is {got.dtype} {tuple(got.shape)}; its entry in config.json asks for"
                    f" {want.dtype} {tuple(want.shape)}"
                )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _factor_bits(packed: Mapping[str, Tensor]) -> int:
    down = packed.get("down")
    if down is None or down.numel() > 1:
        return 8
    return 8 * packed["down_scale"].element_size()
