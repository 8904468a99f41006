"""Everything a user chooses about a quantization run, checked before any work begins."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankbook.calibration.methods import METHODS
from rankbook.calibration.record.quantized_linear import allowed_groups, check_group
from rankbook.calibration.settings import ACTIVATIONS, ALLOCATED, KV_BITS, RANGES
from rankbook.plugins import layout

AUTO_GROUP = 64
"""Group size that ``auto`` prefers: the side data of one group cost about 0.4 bits per weight with two planes."""
MX_BLOCK = 32
"""Group size that ``auto`` prefers for mxint: the block of the MX formats (OCP specification 1.0)."""
TABLE_BITS = (0, 4, 8)
"""Widths for the embedding and the output layer; 0 leaves them alone."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of a run. ``None`` means the method's own default; `method_config` hands them to the method.

    Raises:
        ValueError: At construction, for a value that is not allowed; the message names the ones that are.
    """

    method: str = _option("lcq", "Quantization method.")
    bits: int = _option(3, "Bits per code: 2, 3, 4 or 8.")
    target_bits: float | None = _option(
        None, "Stored bits per weight of all layers together: bits are then chosen for each layer (needs scipy)."
    )
    allocate: tuple[str, ...] = _option(("bits",), f"What target_bits chooses: {', '.join(ALLOCATED)}.")
    group_size: int | str = _option("auto", "Weights of one row that share a codebook: a number, 'auto' or 'channel'.")
    rank: int | None = _option(
        None, "Planes of the codebook matrix (lcq) or rank of the scaling (lrq); others ignore it."
    )
    weight_format: str | None = _option(
        None, "Fixed level table: affine, symmetric, nf4 or mxint (lrq: the first two)."
    )
    clip_search: bool | None = _option(None, "Search the clipping range (methods with fixed levels).")
    error_branch: str | None = _option(None, "Low-rank error branch: none, lqer, l2qer, qera-diag or qera.")
    error_rank: int = _option(32, "Rank of the error branch.")
    factor_bits: int = _option(8, "Bits of the error branch's factors: 8 or 16.")
    param_bits: int | None = _option(None, "Bits of each per-group number: 8 or 16.")
    level_dtype: str | None = _option(None, "Storage of learned levels: int8 or float16.")
    effort: str | None = _option(None, "Training budget: fast, default or high.")
    branch_passes: int = _option(1, "Rounds of quantizing what the error branch leaves and fitting the branch again.")
    scale_inputs: str | None = _option(None, "Input scaling hidden in norms before any method: none, awq, smoothquant.")
    scale_strength: float = _option(0.5, "SmoothQuant's alpha: share of the range that moves into the weights, 0 to 1.")
    activations: str = _option("none", f"Inputs of packed layers: {', '.join(ACTIVATIONS)}.")
    activation_range: str = _option("mse", f"Choice of static ranges: {', '.join(RANGES)}.")
    activation_skip: tuple[str, ...] = _option((), "Layers whose inputs are left alone; * and ? are wildcards.")
    activation_training: bool | None = _option(
        None, "Train blocks with quantized inputs; without a choice where activations have static ranges."
    )
    kv_bits: int = _option(0, "Bits of keys and values in evaluation: 8 or 4; 0 leaves them alone.")
    calib: str | None = _option(
        None, "Calibration text (.txt, .jsonl or a datasets name); default: sampled from the model."
    )
    calib_sequences: int = _option(64, "Calibration windows.")
    calib_length: int = _option(512, "Tokens per calibration window.")
    seed: int = _option(0, "Seed of every random choice.")
    quantize_lm_head: int = _option(0, "Bits of the output layer: 8 or 4; 0 leaves it alone.")
    quantize_embeddings: int = _option(0, "Bits of the embedding: 8 or 4; 0 leaves it alone.")
    skip: tuple[str, ...] = _option((), "Names of layers to leave alone; * and ? are wildcards.")
    allow_partial: bool = _option(False, "Quantize a model of whose blocks less than half of the weights can be.")
    method_options: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "Further options of the method."})

    def __post_init__(self) -> None:
        _choose("method", self.method, tuple(METHODS))
        _choose("bits", self.bits, layout.BITS)
        _choose("quantize_lm_head", self.quantize_lm_head, TABLE_BITS)
        _choose("quantize_embeddings", self.quantize_embeddings, TABLE_BITS)
        _choose("factor_bits", self.factor_bits, (8, 16))
        _choose("activations", self.activations, ACTIVATIONS)
        _choose("activation_range", self.activation_range, RANGES)
        _choose("kv_bits", self.kv_bits, KV_BITS)
        if self.error_branch is not None:
            _choose("error_branch", self.error_branch, error_branches())
        if self.target_bits is not None and not 1 <= self.target_bits <= 16:
            raise ValueError(f"target_bits is {self.target_bits}; give stored bits per weight, such as 3.2")
        self._check_allocate()
        if self.scale_inputs is not None:
            _choose("scale_inputs", self.scale_inputs, scalings())
        if not 0 <= self.scale_strength <= 1:
            raise ValueError(f"scale_strength is {self.scale_strength}; give a number from 0 to 1")
        for name, least in _LEAST:
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")
        if isinstance(self.group_size, str):
            _choose("group_size", self.group_size, ("auto", "channel"))
        fields = self._config_fields()
        for name in ("weight_format", "clip_search"):
            if getattr(self, name) is not None and _FIELD.get(name, name) not in fields:
                raise ValueError(f"method {self.method!r} has no option {name}; leave it out or choose another method")
        if unknown := sorted(set(self.method_options) - fields):
            raise ValueError(f"method {self.method!r} has no options {unknown}; it has {', '.join(sorted(fields))}")
        self.method_config()  # the method checks its own options

    def _check_allocate(self) -> None:
        for item in self.allocate:
            _choose("allocate", item, ALLOCATED)
        if self.target_bits is None and set(self.allocate) != {"bits"}:
            raise ValueError(f"allocate {', '.join(self.allocate)} needs a budget; give target_bits, such as 3.2")
        if not self.allocate:
            raise ValueError(f"allocate names nothing; choose some of {', '.join(ALLOCATED)}")
        if "rank" in self.allocate and not METHODS[self.method].rank_is_stored:
            able = [name for name, method in METHODS.items() if method.rank_is_stored]
            raise ValueError(f"method {self.method!r} stores no rank that could be chosen; {', '.join(able)} does")
        own = "error_branch" in self._config_fields() and self.error_branch is None
        if "branch" in self.allocate and self.error_branch in (None, "none") and not own:
            raise ValueError("allocate branch needs an error branch; give error_branch, and error_rank as the largest")

    def method_config(self, in_features: int | None = None) -> Any:
        """Return the method's config for a layer with K = ``in_features`` (None: for no layer in particular).

        Raises:
            ValueError: The group size does not divide K, or the method refuses an option.
        """
        group = self._preferred_group() if in_features is None else self.group(in_features)
        values: dict[str, Any] = {"bits": self.bits, "group_size": group, "seed": self.seed}
        for name in ("rank", "weight_format", "clip_search", "param_bits", "level_dtype", "effort", "error_branch"):
            if getattr(self, name) is not None:
                values[_FIELD.get(name, name)] = getattr(self, name)
        values |= {"error_rank": self.error_rank, "factor_bits": self.factor_bits, "passes": self.branch_passes}
        fields = self._config_fields()
        known = {name: value for name, value in values.items() if name in fields}
        return METHODS[self.method].config_type(**{**known, **self.method_options})

    def group(self, in_features: int) -> int:
        """Return the group size for rows of ``in_features`` weights.

        Raises:
            ValueError: The number given does not divide the row; the message names those that do.
        """
        if self.group_size == "channel":
            return in_features
        if isinstance(self.group_size, int):
            check_group(in_features, self.group_size)
            return self.group_size
        prefer = self._preferred_group()
        # The nearest in ratio, the smaller of two as near: accuracy and side data both go with the logarithm.
        return min(allowed_groups(in_features), key=lambda size: (abs(math.log(size / prefer)), size))

    def driver_branch(self) -> str:
        """Return the kind of error branch that the driver adds; ``none`` where the method has an option for it."""
        if self.error_branch is None or "error_branch" in self._config_fields():
            return "none"
        return self.error_branch

    def scaling(self) -> str:
        """Return the kind of input scaling: the one chosen, or the method's own."""
        return METHODS[self.method].scale_inputs if self.scale_inputs is None else self.scale_inputs

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        values = dataclasses.asdict(self)
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {**values, **lists, "method_options": dict(self.method_options)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> QuantizeOptions:
        """Undo `to_json`.

        Raises:
            ValueError: Unknown names.
        """
        names = {item.name for item in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"unknown options {unknown}; there are {', '.join(sorted(names))}")
        given: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in values.items()}
        return cls(**given)

    def _config_fields(self) -> set[str]:
        return {item.name for item in dataclasses.fields(METHODS[self.method].config_type)}

    def _preferred_group(self) -> int:
        if isinstance(self.group_size, int):
            return self.group_size
        defaults = {item.name: item.default for item in dataclasses.fields(METHODS[self.method].config_type)}
        chosen = self.method_options.get("format", self.weight_format or defaults.get("format"))
        return MX_BLOCK if chosen == "mxint" else AUTO_GROUP


_LISTS = ("allocate", "skip", "activation_skip")
_FIELD = {"weight_format": "format"}
"""Options whose name differs from the field of the methods' configs."""


_LEAST = (("error_rank", 1), ("branch_passes", 1), ("calib_sequences", 1), ("calib_length", 2))


def scalings() -> tuple[str, ...]:
    """Return the kinds of input scaling."""
    from rankbook.calibration.model.scaling import SCALINGS

    return SCALINGS


def error_branches() -> tuple[str, ...]:
    """Return the kinds of error branch."""
    from rankbook.calibration.fitting.error_branch import ERROR_BRANCHES

    return tuple(ERROR_BRANCHES)


def _choose(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not supported; choose one of {', '.join(map(str, allowed))}")
