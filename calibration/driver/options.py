"""Everything a user chooses about a quantization run, checked before any work begins."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbook.calibration.device import DeviceOptions
from rankbook.calibration.driver.cluster_options import ClusterOptions
from rankbook.calibration.memory import MemoryOptions, read_gigabytes
from rankbook.calibration.option import ADVANCED, EFFORT, WHAT, WHERE, Seeded, choose, near, option
from rankbook.calibration.settings import (
    ACTIVATION_FORMATS,
    ALLOCATED,
    EFFORTS,
    ERROR_BRANCHES,
    FORMATS,
    INPUT_BRANCHES,
    KV_BITS,
    RANGES,
    SCALINGS,
    method_names,
)
from rankbook.plugins.widths import BITS

if TYPE_CHECKING:
    from rankbook.calibration.driver.rules import Rules
    from rankbook.calibration.fitting.grids import Grid
    from rankbook.calibration.methods import Method
    from rankbook.calibration.model.placement import Placement

AUTO_GROUP = 64
"""Group size that ``auto`` prefers: the side data of one group cost about 0.4 bits per weight with two planes."""
MX_BLOCK = 32
"""Group size that ``auto`` prefers for mxint: the block of the MX formats (OCP specification 1.0)."""
EMBEDDING_BITS = (0, 4, 8)
"""Widths for the embedding and the output layer; 0 leaves them alone."""


def group_size(text: str) -> int | str:
    """Read a group size: a number, ``auto`` or ``channel``.

    Raises:
        ValueError: It is none of these.
    """
    if text in ("auto", "channel"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a group size; give a number, auto or channel") from None


@dataclass(frozen=True)
class QuantizeOptions(Seeded, DeviceOptions, MemoryOptions, ClusterOptions):
    """Options of a run. ``None`` means the method's own default; `method_config` hands them to the method.

    Raises:
        ValueError: At construction, for a value that is not allowed; the message names the ones that are.
    """

    method: str = option("lcq", f"how codes are chosen: {', '.join(method_names())}", metavar="M", group=WHAT)
    bits: int | None = option(None, "bits of a code; default: the method's", choices=BITS, group=WHAT)
    group_size: int | str = option(
        "auto", "weights that share a codebook: a number, auto or channel", metavar="G", parse=group_size, group=WHAT
    )
    rank: int | None = option(
        None,
        "rank of the codebook matrix (lcq), 1 to 2^bits - 1, or of the scaling matrices (lrq)",
        metavar="R",
        group=WHAT,
    )
    weight_format: str | None = option(
        None, "fixed levels, for methods that have them (lrq: the first two)", choices=FORMATS, group=WHAT
    )
    target_bits: float | None = option(
        None,
        "average stored bits per weight, distributed over the layers by their sensitivity; needs scipy",
        metavar="B",
        group=WHAT,
    )
    allocate: tuple[str, ...] = option(
        ("bits",),
        "what --target-bits chooses for each layer: bits, rank (planes of lcq, up to --rank), branch (its rank, up to"
        " --error-rank)",
        choices=ALLOCATED,
        group=WHAT,
    )
    error_branch: str | None = option(
        None, "low-rank error branch added to each layer", choices=ERROR_BRANCHES, group=WHAT
    )
    error_rank: int = option(32, "rank of the error branch", metavar="Q", least=1, group=WHAT)
    quantize_lm_head: int = option(
        0,
        "bits of the output layer; 4 are fitted to its inputs, 0 does not quantize it",
        choices=EMBEDDING_BITS,
        group=WHAT,
    )
    quantize_embeddings: int = option(
        0, "bits of the embedding; 0 does not quantize it", choices=EMBEDDING_BITS, group=WHAT
    )
    activations: str = option(
        "none",
        "how inputs of packed layers are rounded: static8 (INT8, one step size per tensor, exported as QuantizeLinear),"
        " token8 (one range per token), mxint8 and mxint6 (blocks of 16); the token8 and mxint formats exist"
        " in PyTorch only",
        choices=ACTIVATION_FORMATS,
        group=WHAT,
    )
    kv_bits: int = option(
        0,
        "bits of keys and values, per token and head, before the rotary embedding, in PyTorch only; 0 does not round",
        choices=KV_BITS,
        group=WHAT,
    )
    skip: tuple[str, ...] = option((), "layers not to quantize; * and ? are wildcards", metavar="NAME", group=WHAT)
    rules: tuple[str, ...] = option(
        (),
        "other options for the layers that a pattern matches, as 'PATTERN: bits=4 rank=1 group=32 branch=qera:32"
        " method=rtn' or 'PATTERN: skip'; may be repeated, the first matching rule applies",
        metavar="RULE",
        flags=("--rule",),
        group=WHAT,
    )
    calib: str | None = option(
        None,
        "calibration text: .txt, .jsonl, .json or a datasets name; default: sampled from the model",
        metavar="FILE",
        group=WHERE,
    )
    calib_chat: bool = option(
        False, "the calibration text holds chats ('messages'): apply the model's chat template", group=WHERE
    )
    calib_sequences: int = option(64, "calibration windows", metavar="N", least=1, group=EFFORT)
    calib_length: int = option(512, "tokens per calibration window", metavar="N", least=2, group=EFFORT)
    effort: str | None = option(
        None,
        "fast: the closed form, without training; default: trained by block; high: trained longer",
        choices=EFFORTS,
        group=EFFORT,
    )
    clip_search: bool | None = option(None, "search the clipping range (methods with fixed levels)", group=EFFORT)
    scale_inputs: str | None = option(None, "first fold input scales into the norms", choices=SCALINGS, group=EFFORT)
    branch_passes: int = option(
        1, "rounds of quantizing around the branch and refitting it", metavar="N", least=1, group=EFFORT
    )
    device_memory: float | None = option(
        None,
        "device memory for activations, in GB or with a unit, the rest stays on the host; default: half of what is"
        " free",
        metavar="GB",
        least=0,
        parse=read_gigabytes,
        group=ADVANCED,
    )
    devices: str | None = option(
        None,
        "devices over which the layers of a block are distributed, such as 0,1; the first one also trains",
        metavar="N,N",
        group=ADVANCED,
    )
    scale_strength: float = option(
        0.5, "smoothquant's alpha: share of the range that moves into the weights, 0 to 1", metavar="A", group=ADVANCED
    )
    factor_bits: int = option(8, "bits of the branch's factors", choices=(8, 16), group=ADVANCED)
    param_bits: int | None = option(
        None, "bits of each parameter of a group; default: the method's", choices=(8, 16), group=ADVANCED
    )
    level_dtype: str | None = option(
        None,
        "storage of learned levels; default: the method's",
        choices=("int8", "float16"),
        group=ADVANCED,
    )
    activation_range: str = option(
        "mse", "how static ranges are chosen from the calibration text", choices=RANGES, group=ADVANCED
    )
    activation_skip: tuple[str, ...] = option(
        (),
        "layers whose inputs are not rounded, such as *.down_proj, whose outliers one step size does not cover",
        metavar="NAME",
        group=ADVANCED,
    )
    activation_training: bool | None = option(
        None,
        "train blocks with rounded inputs (straight-through gradients); default: with static8 only",
        group=ADVANCED,
    )
    method_options: Mapping[str, Any] = option(
        {},
        "further options of the method; `--method M --help` lists them",
        metavar="KEY=VALUE",
        flags=("--method-option",),
        group=ADVANCED,
    )
    allow_partial: bool = option(
        False, "quantize even if less than half of the weights in the blocks can be quantized", group=ADVANCED
    )

    def __post_init__(self) -> None:
        choose("method", self.method, tuple(_methods()))
        super().__post_init__()
        if self.target_bits is not None and not 1 <= self.target_bits <= 16:
            raise ValueError(f"target_bits is {self.target_bits}; give stored bits per weight, such as 3.2")
        self._check_allocate()
        if not 0 <= self.scale_strength <= 1:
            raise ValueError(f"scale_strength is {self.scale_strength}; give a number from 0 to 1")
        if isinstance(self.group_size, str):
            choose("group_size", self.group_size, ("auto", "channel"))
        if self.device_indexes() and self.cluster:
            raise ValueError("devices and cluster both distribute layers; leave one of them out")
        fields = self._config_fields()
        for name in ("rank", "weight_format", "clip_search", "level_dtype"):
            if getattr(self, name) is not None and renamed(name) not in fields:
                raise ValueError(f"method {self.method!r} has no option {name}; leave it out or choose another method")
        if unknown := sorted(set(self.method_options) - fields):
            meant = "".join(near(name, fields) for name in unknown)
            raise ValueError(
                f"method {self.method!r} has no options {unknown}; it has {', '.join(sorted(fields))}{meant}"
            )
        self.method_config()  # the method checks its own options
        _ = self.layer_rules

    def _check_allocate(self) -> None:
        if self.target_bits is None and set(self.allocate) != {"bits"}:
            raise ValueError(f"allocate {', '.join(self.allocate)} needs a budget; give target_bits, such as 3.2")
        if not self.allocate:
            raise ValueError(f"allocate names nothing; choose some of {', '.join(ALLOCATED)}")
        if "rank" in self.allocate and self._method().predict is None:
            able = [name for name, method in _methods().items() if method.predict is not None]
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
        own = {renamed(item.name): getattr(self, item.name) for item in dataclasses.fields(self)}
        fields = self._config_fields()
        known = {name: value for name, value in own.items() if name in fields and value is not None}
        return self._method().config_type(**{**known, "group_size": group, **self.method_options})

    def grid(self, in_features: int) -> Grid:
        """Return the grid that rows are rounded to, ranges unsearched; an even one where codebooks are fitted.

        Raises:
            ValueError: As `method_config`.
        """
        from rankbook.calibration.fitting.grids import Grid

        config = self.method_config(in_features)
        found: Grid = config.grid() if hasattr(config, "grid") else Grid(config.bits, config.group_size)
        return dataclasses.replace(found, clip_search=False)

    def group(self, in_features: int) -> int:
        """Return the group size for rows of ``in_features`` weights.

        Raises:
            ValueError: The number given does not divide the row; the message names those that do.
        """
        from rankbook.plugins.layer_spec import allowed_groups, check_group

        if self.group_size == "channel":
            return in_features
        if isinstance(self.group_size, int):
            check_group(in_features, self.group_size)
            return self.group_size
        prefer = self._preferred_group()
        # The nearest in ratio, the smaller of two as near: accuracy and side data both go with the logarithm.
        return min(allowed_groups(in_features), key=lambda size: (abs(math.log(size / prefer)), size))

    def device_indexes(self) -> tuple[int, ...]:
        """Return the numbers of ``devices``, none where it is not given.

        Raises:
            ValueError: They are no list of numbers, or ``device`` names one by its index as well.
        """
        if self.devices is None:
            return ()
        parts = self.devices.split(",")
        if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
            raise ValueError(f"devices {self.devices!r} is not a list of different indexes; give one such as 0,1")
        if ":" in self.device:
            raise ValueError(
                f"device {self.device} and devices {self.devices} both name indexes; leave one of them out"
            )
        return tuple(map(int, parts))

    def placement(self) -> Placement:
        """Return the devices that the options name.

        Raises:
            ValueError: There is no such kind of device.
            DeviceError: A device is not there.
        """
        from rankbook.calibration.model.placement import Placement

        return Placement.of(self.device, self.device_indexes(), self.device_memory)

    def shaping(self) -> dict[str, Any]:
        """Return the options without those that say where it is computed: what shapes the result."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _PLACES}

    def code_bits(self) -> int:
        """Return the bits of a code: those given, or the method's own."""
        return int(self.method_config().bits)

    def branch(self) -> str:
        """Return the kind of error branch that layers get, from the driver or from the method."""
        return str(getattr(self.method_config(), "error_branch", self.driver_branch()))

    def driver_branch(self) -> str:
        """Return the kind of error branch that the driver adds; ``none`` where the method has an option for it."""
        if self.error_branch is None or "error_branch" in self._config_fields():
            return "none"
        return self.error_branch

    def scaling(self) -> str:
        """Return the kind of input scaling: the one chosen, or the method's own."""
        return self._method().scale_inputs if self.scale_inputs is None else self.scale_inputs

    @functools.cached_property
    def layer_rules(self) -> Rules:
        """The rules, read."""
        from rankbook.calibration.driver.rules import Rules

        return Rules.of(self)

    def of_layer(self, name: str) -> QuantizeOptions:
        """Return the options of a layer by its full name: those of the rule that holds for it, or these."""
        return self.layer_rules.for_layer(name, self)

    def trains(self) -> bool:
        """Return whether blocks are trained."""
        method = self._method()
        return method.refine is not None and method.trains(self.method_config())

    def weighs_inputs(self) -> bool:
        """Return whether a block is solved with what enters its layers; without, nothing runs through it."""
        method, config, branch = self._method(), self.method_config(), self.driver_branch()
        fitted = branch in INPUT_BRANCHES or (branch != "none" and self.branch_passes > 1)
        own = self.trains() or fitted or self.scaling() != "none" or method.weighs_inputs(config)
        return own or any(options.weighs_inputs() for options in self.layer_rules.options.values())

    def needs_text(self) -> bool:
        """Return whether calibration text is needed for any layer of a block."""
        from rankbook.calibration.activations.inputs import is_static

        return self.weighs_inputs() or self.target_bits is not None or is_static(self.activations)

    def _method(self) -> Method:
        return _methods()[self.method]

    def _config_fields(self) -> set[str]:
        return {item.name for item in dataclasses.fields(self._method().config_type)}

    def _preferred_group(self) -> int:
        if isinstance(self.group_size, int):
            return self.group_size
        defaults = {item.name: item.default for item in dataclasses.fields(self._method().config_type)}
        chosen = self.method_options.get("format", self.weight_format or defaults.get("format"))
        return MX_BLOCK if chosen == "mxint" else AUTO_GROUP


def _methods() -> Mapping[str, Method]:
    """The methods; torch and all of them are loaded here, not by the help of the command line."""
    from rankbook.calibration.methods import METHODS

    return METHODS


_PLACES = ("device", "device_memory", "devices", "memory_limit", "cluster", "cluster_gpus", "cluster_weights")
"""Options that say where a run computes; places differ in the order of sums, and in no more."""
_FIELD = {"weight_format": "format", "branch_passes": "passes"}
"""Options whose name differs from the field of the methods' configs."""


def renamed(name: str) -> str:
    """Return the name that the methods' configs have for an option of a run."""
    return _FIELD.get(name, name)
