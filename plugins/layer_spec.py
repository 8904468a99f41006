"""One packed layer as data: its sizes, the form of each part, and from these every tensor, its bits and its checks.

The only description of stored layers: records, checkpoints, torch modules, operators, the exported file and the C++
header are made from it. Letters of shapes are those of `rankbook.plugins.forms`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from rankbook.plugins import forms, layout
from rankbook.plugins.forms import COMPACT, CONSTANTS, FACTORS, PARAMS, Form, PartForm, TensorSpec

KINDS = ("linear", "embedding")
"""``y = x @ W.T + bias``, or a lookup of rows of W."""
LEVEL_DTYPES = ("int8", "float16")
"""Types of stored levels."""
BIAS_DTYPES = ("float32", "float16", "bfloat16")
"""Types of a stored bias."""
GROUP_MULTIPLE, MIN_GROUP, MAX_GROUP = 16, 16, 256
"""Group sizes are multiples of 16 (what one tensor-core step covers) up to 256, or the whole row."""
LARGEST_SIZE = 2**31 - 1
"""Largest N, K or R: kernels count in 32 bits."""

_KEYS = {"params": "param_bits", "factors": "factor_bits", "branch_rank": "rank"}
"""Names in files, where they differ from the fields'."""


@dataclass(frozen=True)
class LayerSpec:
    """One packed layer; with it a module can be built before its tensors are read.

    Attributes:
        kind: One of `KINDS`.
        method: Name of the method that made it.
        bits: Width of a code, one of `rankbook.plugins.layout.BITS`.
        out_features: N.
        in_features: K.
        group: Weights of a row that share a codebook.
        planes: P, the rank of the codebook matrix without its offset.
        has_offset: Whether the last plane of the parameters is the offset.
        params: Form of the group parameters.
        level_dtype: One of `LEVEL_DTYPES`.
        bias: One of `BIAS_DTYPES`, or empty without a bias.
        branch_rank: R, the rank of the error branch; 0 without one.
        factors: Form of the factors of the error branch.
        scale: Factor on the rows an embedding returns (Gemma multiplies them by ``sqrt(hidden)``).
        shared_with: Name of the layer that holds the tensors, empty if it holds its own (tied embeddings).
        compact: How a checkpoint holds parameters that operators take in float32, one of `forms.COMPACT`: ``zeros`` are
            a float16 scale and an int8 zero point of each group, ``e4m3`` are 8-bit floats with one factor for a
            panel; empty where it holds them as operators take them.

    Raises:
        ValueError: At construction, for a field of another type or out of its range; the message names what is allowed.
    """

    kind: str
    method: str
    bits: int
    out_features: int
    in_features: int
    group: int
    planes: int
    has_offset: bool
    params: Form = Form.INT8
    level_dtype: str = "int8"
    bias: str = ""
    branch_rank: int = 0
    factors: Form = Form.INT8
    scale: float = 1.0
    shared_with: str = ""
    compact: str = ""

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {"kind": KINDS, "bits": layout.BITS, "level_dtype": LEVEL_DTYPES}
        allowed["bias"], allowed["compact"] = ("", *BIAS_DTYPES), ("", *COMPACT)
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(repr, values))}")
        ranges = {"out_features": (1, LARGEST_SIZE), "in_features": (1, LARGEST_SIZE), "planes": (1, 1 << self.bits)}
        ranges["branch_rank"] = (0, LARGEST_SIZE)
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{_KEYS.get(name, name)} is {getattr(self, name)}; allowed are {low} to {high}")
        check_group(self.in_features, self.group)
        if self.compact and (self.params is not Form.FLOAT32 or (self.compact == "zeros") != self.has_offset):
            raise ValueError(f"compact is {self.compact!r}, which is for other group parameters; the file is damaged")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale is {self.scale}; it must be finite")

    @classmethod
    def from_json(cls, name: str, entry: object) -> LayerSpec:
        """Read the entry of layer ``name`` in config.json or in the metadata of a file.

        Raises:
            ValueError: Fields are missing, unknown or wrong.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"the entry of layer {name!r} is {type(entry).__name__}, not an object; the file is damaged"
            )
        keys = {_KEYS.get(field.name, field.name): field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(entry) - set(keys)):
            raise ValueError(f"layer {name!r} has unknown fields {unknown}; another version of rankbook wrote it")
        needed = [key for key, field in keys.items() if field.default is dataclasses.MISSING]
        if missing := [key for key in needed if key not in entry]:
            raise ValueError(f"layer {name!r} lacks fields: {', '.join(missing)}")
        kind: Any = cls
        types = _types(kind)
        try:
            return cls(**{keys[key].name: _typed(key, value, types[keys[key].name]) for key, value in entry.items()})
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, under their names in files."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        differ = {name: value for name, (value, default) in values.items() if value != default}
        return {_KEYS.get(name, name): int(v) if isinstance(v, Form) else v for name, v in differ.items()}

    @classmethod
    def of_constants(
        cls, bits: int, attributes: Mapping[str, Any], constants: Mapping[str, TensorSpec], kind: str = "linear"
    ) -> LayerSpec:
        """Return the layer whose constants an operator was given: the only reader of forms that are known by shape.

        Args:
            bits: Width of the operator's codes.
            attributes: ``in_features``, ``out_features`` and ``offset`` of the node.
            constants: Shape and type of each constant by formal name.
            kind: One of `KINDS`.

        Raises:
            ValueError: The constants are those of no layer; the message names what was given and what is allowed.
        """
        rows, columns, offset = (int(attributes[name]) for name in ("out_features", "in_features", "offset"))
        panels, blocks = layout.packed_shape(rows, columns, bits)[:2]
        sizes = {"N": rows, "K": columns, "NP": panels, "KB": blocks, "b": bits, "L": 1 << bits}
        for name in ("codes", "levels"):
            _, sizes = forms.match([{name: CONSTANTS[name][0]}], constants, sizes)
        params, sizes = forms.match(list(PARAMS.values()), constants, sizes)
        factors = 0
        if "down" in constants or "up" in constants:
            factors, sizes = forms.match(list(FACTORS.values()), constants, sizes)
        if "bias" in constants:
            forms.match([{"bias": part} for part in CONSTANTS["bias"]], constants, sizes)
        if columns % sizes["G"]:
            raise ValueError(f"params: {sizes['G']} groups do not divide in_features = {columns}")
        return cls(
            kind=kind,
            method="",
            bits=bits,
            out_features=rows,
            in_features=columns,
            group=columns // sizes["G"],
            planes=sizes["Q"] - offset,
            has_offset=bool(offset),
            params=tuple(PARAMS)[params],
            level_dtype="float16",
            bias="float32" if "bias" in constants and constants["bias"].shape == (rows,) else "",
            branch_rank=sizes.get("R", 0),
            factors=tuple(FACTORS)[factors],
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the letters of the module docstring."""
        panels, blocks = layout.packed_shape(self.out_features, self.in_features, self.bits)[:2]
        return {
            **{"N": self.out_features, "K": self.in_features, "NP": panels, "KB": blocks, "b": self.bits},
            **{"L": 1 << self.bits, "G": self.in_features // self.group, "P": self.planes},
            **{"Q": self.planes + self.has_offset, "R": self.branch_rank},
        }

    def wide(self) -> LayerSpec:
        """Return the layer with parameters as operators take them."""
        return dataclasses.replace(self, compact="")

    def tensors(self) -> dict[str, TensorSpec]:
        """Return every packed tensor by name, as checkpoints and torch modules hold them; none of a shared layer."""
        if self.shared_with:
            return {}
        parts = {
            "codes": PartForm(CONSTANTS["codes"][0].shape, "uint8"),
            "levels": PartForm(("P", "L"), self.level_dtype),
            **(COMPACT[self.compact] if self.compact else PARAMS[self.params]),
            **({"bias": PartForm(("N",), self.bias)} if self.bias else {}),
            **(FACTORS[self.factors] if self.branch_rank else {}),
        }
        return self._sized(parts)

    def constants(self) -> dict[str, TensorSpec]:
        """Return the constants of the layer's operator by formal name.

        They differ from `tensors` where ONNX does: codes are INT8 (see `layout.to_carrier`), levels are float16 with a
        row of ones for the offset, and there is always a bias of a product, in float32.
        """
        parts = {name: CONSTANTS[name][0] for name in ("codes", "levels")} | dict(PARAMS[self.params])
        if self.kind == "linear":
            parts["bias"] = CONSTANTS["bias"][0 if self.bias else 1]
        return self._sized(parts | dict(FACTORS[self.factors] if self.branch_rank else {}))

    def stored_bits(self) -> dict[str, int]:
        """Return the stored bits of each part, padding included; the bias is not quantized and does not count."""
        return bits_of(self.tensors())

    def bits_per_weight(self) -> float:
        """Return stored bits per weight, all side data counted; 0 for a layer that shares another's tensors."""
        return sum(self.stored_bits().values()) / self.weights

    @property
    def weights(self) -> int:
        """N * K."""
        return self.out_features * self.in_features

    def check(self, tensors: Mapping[str, Any], name: str = "layer") -> None:
        """Check that arrays of numpy or torch are the packed tensors of this layer and hold finite numbers.

        Raises:
            ValueError: One is missing, has another shape or type, or holds NaN or infinity; the message names it.
        """
        for part, want in self.tensors().items():
            if part not in tensors:
                raise ValueError(f"{name} lacks the tensor {part!r}; the checkpoint is incomplete, write it again")
            want.check(f"{name}.{part}", tensors[part])

    def _sized(self, parts: Mapping[str, PartForm]) -> dict[str, TensorSpec]:
        return {name: part.sized(self.sizes) for name, part in parts.items()}


def bits_of(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Return the bits of each tensor of a layer but its bias."""
    return {name: tensor.bits for name, tensor in tensors.items() if name != "bias"}


def check_group(in_features: int, group: int) -> None:
    """Check that ``group`` can cut rows of ``in_features`` weights.

    Raises:
        ValueError: It cannot; the message names the group sizes that can.
    """
    if group not in allowed_groups(in_features):
        allowed = ", ".join(map(str, allowed_groups(in_features)))
        raise ValueError(
            f"group size {group} cannot cut rows of {in_features} weights; choose one of {allowed}"
            f" ({in_features} means one group per row), or 'auto'"
        )


def allowed_groups(in_features: int) -> list[int]:
    """Return the group sizes for rows of ``in_features``: divisors, multiples of 16 up to 256, and the whole row."""
    sizes = [g for g in range(MIN_GROUP, MAX_GROUP + 1, GROUP_MULTIPLE) if in_features % g == 0]
    return sizes if in_features in sizes else [*sizes, in_features]


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(key: str, value: object, kind: type) -> Any:
    """Return a value of JSON as a field's type."""
    if kind is Form and type(value) is int and value in tuple(Form):
        return Form(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind:
        return value
    expected = f"one of {', '.join(map(str, map(int, Form)))}" if kind is Form else kind.__name__
    raise ValueError(f"{key} is {value!r}; it must be {expected}")
