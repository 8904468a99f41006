"""Low-bit inputs of packed layers: the settings, the calibration of static ranges, and the hooks that apply them.

Static ranges are one step for each input tensor (W8A8 of LRQ, Lee et al. 2024, section 4; plain TensorRT INT8);
dynamic ones are found anew for each token (W4A8 of LRQ) or block of 16 (MXINT of LQER, Zhang et al. 2024).
The hooks round in floating point: they show the accuracy, not the speed, of integer arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.activations import fake_quant
from rankbook.calibration.model.packed_modules import CodebookLinear
from rankbook.calibration.model.patterns import matches
from rankbook.calibration.settings import ACTIVATION_FORMATS, RANGES

PERCENTILE = 99.99
"""Share of the inputs that the range ``percentile`` covers, in percent."""
_BINS = 4096
_SHRINKS = 100
_HOOK = "_rankbook_input_hook"


@dataclass(frozen=True)
class StaticRange:
    """The step of one input tensor.

    Attributes:
        step: Distance between neighbouring values.
        zero: Code of 0; always 0 where symmetric.
    """

    step: float
    zero: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.step < float("inf"):
            raise ValueError(f"the step of a static range is {self.step}; it must be positive and finite")


@dataclass(frozen=True)
class ActivationConfig:
    """How the inputs of packed layers are quantized, as config.json holds it.

    Attributes:
        kind: One of `ACTIVATION_FORMATS`.
        ranges: For static kinds, the range of each layer's input by the layer's name.
        skip: Names of layers whose input is left alone; * and ? are wildcards.

    Raises:
        ValueError: At construction, for an unknown kind or static ranges that are missing.
    """

    kind: str = "none"
    ranges: Mapping[str, StaticRange] = field(default_factory=dict)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.static and not self.ranges:
            raise ValueError(
                f"activations {self.kind!r} need calibrated ranges; quantize with --activations {self.kind}"
            )

    @property
    def static(self) -> bool:
        """Whether ranges are calibrated."""
        return is_static(self.kind)

    @property
    def symmetric(self) -> bool:
        """Whether 0 is the middle of the range."""
        return self.kind in ("static8", "token8-symmetric")

    def to_json(self) -> dict[str, Any]:
        """Return the entry of config.json."""
        ranges = {name: [item.step, item.zero] for name, item in self.ranges.items()}
        entry: dict[str, Any] = {"kind": self.kind}
        return entry | ({"ranges": ranges} if ranges else {}) | ({"skip": list(self.skip)} if self.skip else {})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any] | None) -> ActivationConfig:
        """Undo `to_json`; no entry means no quantization.

        Raises:
            ValueError: A damaged entry.
        """
        if not entry:
            return cls()
        try:
            ranges = {name: StaticRange(float(s), int(z)) for name, (s, z) in entry.get("ranges", {}).items()}
            return cls(str(entry["kind"]), ranges, tuple(map(str, entry.get("skip", ()))))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the entry 'activations' of config.json is damaged: {error}") from error

    def applies(self, layer: str) -> bool:
        """Return whether the input of a layer is quantized."""
        return self.kind != "none" and not matches(layer, self.skip)

    def function(self, layer: str) -> Callable[[Tensor], Tensor]:
        """Return what is done to the input (..., K) of a layer.

        Raises:
            ValueError: There is no range for the layer.
        """
        if self.static:
            if layer not in self.ranges:
                raise ValueError(f"config.json holds no input range for {layer!r}; quantize the model again")
            found = self.ranges[layer]
            return functools.partial(fake_quant.per_tensor, step=found.step, zero=found.zero, symmetric=self.symmetric)
        if self.kind.startswith("mxint"):
            return functools.partial(fake_quant.mxint, width=int(self.kind.removeprefix("mxint")))
        return functools.partial(fake_quant.per_token, bits=8, symmetric=self.symmetric)


def is_static(kind: str) -> bool:
    """Return whether a kind has calibrated ranges."""
    return kind.startswith("static8")


def check_kind(kind: str) -> None:
    """Check that ``kind`` is one of `ACTIVATION_FORMATS`.

    Raises:
        ValueError: It is not.
    """
    if kind not in ACTIVATION_FORMATS:
        raise ValueError(f"activations {kind!r} are unknown; choose one of {', '.join(ACTIVATION_FORMATS)}")


def install(model: nn.Module, config: ActivationConfig, layers: Iterable[str]) -> None:
    """Quantize what enters the named layers from now on; an earlier setting of theirs is replaced.

    With MXINT the error branch is rounded as in LQER: what comes out of its first and of its second factor as well.

    Raises:
        ValueError: A static kind lacks the range of a layer.
    """
    for name in layers:
        module: Any = model.get_submodule(name)
        for earlier in module.__dict__.pop(_HOOK, ()):
            earlier.remove()
        if not config.applies(name):
            continue
        function = config.function(name)
        hooks = [module.register_forward_pre_hook(_InputHook(function))]
        if config.kind.startswith("mxint") and isinstance(module, CodebookLinear) and module.spec.branch_rank:
            low_rank: Any = module.record().low_rank
            hooks.append(
                module.register_forward_hook(_BranchHook(function, low_rank.down.dense(), low_rank.up.dense()))
            )
        module.__dict__[_HOOK] = hooks


@contextmanager
def applied(model: nn.Module, config: ActivationConfig, layers: Iterable[str]) -> Iterator[None]:
    """Quantize what enters the named layers while the context lasts; gradients pass as if nothing were rounded.

    Where a static range cuts a value off, no gradient passes.

    Raises:
        ValueError: A static kind lacks the range of a layer.
    """
    with ExitStack() as hooks:
        for name in layers:
            reach = config.ranges[name].step if config.static and name in config.ranges else math.inf
            through = _InputHook(config.function(name), reach)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(through))
        yield


@dataclass(frozen=True)
class _InputHook:
    """A forward pre-hook with the gradient of the unrounded input; a class, so that models can be copied and pickled.

    Attributes:
        function: Rounds a tensor.
        reach: Largest change that is rounding; above, the value was cut off.
    """

    function: Callable[[Tensor], Tensor]
    reach: float = math.inf

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return (self.function(x), *args[1:])
        change = self.function(x.detach()) - x.detach()
        if self.reach < math.inf:
            kept = change.abs() <= self.reach
            return (torch.where(kept, x + change, x.detach() + change), *args[1:])
        return (x + change, *args[1:])


@dataclass(frozen=True)
class _BranchHook:
    """A forward hook that exchanges the exact error branch within an output for a rounded one.

    Attributes:
        function: Rounds a tensor.
        down: (R, K) float32.
        up: (N, R) float32.
    """

    function: Callable[[Tensor], Tensor]
    down: Tensor
    up: Tensor

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        down, up = self.down.to(args[0].device, args[0].dtype), self.up.to(args[0].device, args[0].dtype)
        inner = args[0] @ down.T
        rounded = self.function(self.function(inner) @ up.T)
        result: Tensor = output + (rounded - inner @ up.T)
        return result


@torch.no_grad()
def calibrate(
    run: Callable[[], None], model: nn.Module, layers: Iterable[str], kind: str, how: str
) -> ActivationConfig:
    """Choose static ranges from what enters the layers while ``run`` feeds calibration data through the model.

    Args:
        run: Runs the model, in as many calls as it likes.
        model: With its weights quantized.
        layers: Names of the layers whose inputs are quantized.
        kind: A static kind.
        how: One of `RANGES`.

    Raises:
        ValueError: An unknown ``how``, or a layer that saw no input.
    """
    if how not in RANGES:
        raise ValueError(f"activation range {how!r} is unknown; choose one of {', '.join(RANGES)}")
    seen = {name: Histogram() for name in layers}

    def observe(histogram: Histogram, _module: nn.Module, args: Any) -> None:
        histogram.add(args[0])

    with ExitStack() as hooks:
        for name, histogram in seen.items():
            hook = functools.partial(observe, histogram)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))
        run()
    if empty := [name for name, histogram in seen.items() if histogram.count == 0]:
        raise ValueError(f"{empty[0]} saw no calibration input; give text that reaches it, or leave it out with --skip")
    symmetric = kind == "static8"
    return ActivationConfig(kind, {name: item.range(how, symmetric=symmetric) for name, item in seen.items()})


class Histogram:
    """Counts of the values of one input tensor, in bins over [-bound, bound]; the bound doubles when it must."""

    def __init__(self) -> None:
        """Start empty."""
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.bound = 0.0
        self.low = self.high = 0.0

    @property
    def count(self) -> int:
        """Values seen."""
        return int(self.counts.sum())

    def add(self, x: Tensor) -> None:
        """Add the values of a tensor."""
        values = x.detach().float().flatten()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        peak = max(-self.low, self.high)
        if self.bound == 0.0:
            self.bound = peak or 1.0
        while peak > self.bound:  # pairs of bins become the bins of the middle half
            quarter = _BINS // 4
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(merged, (quarter, quarter))
            self.bound *= 2
        self.counts += torch.histc(values, _BINS, -self.bound, self.bound).double().cpu()

    def range(self, how: str, *, symmetric: bool) -> StaticRange:
        """Return the step that the rule ``how`` chooses."""
        if how == "minmax":
            return _range(self.low, self.high, symmetric=symmetric)
        if how == "percentile":
            return self._percentile(symmetric=symmetric)
        trials = [1 - index / _SHRINKS for index in range(_SHRINKS)]
        found = [_range(self.low * trial, self.high * trial, symmetric=symmetric) for trial in trials]
        return min(found, key=lambda item: self._error(item, symmetric=symmetric))

    def _percentile(self, *, symmetric: bool) -> StaticRange:
        """Leave the largest magnitudes out, or equal shares at both ends where the range is not symmetric."""
        centres = self._centres()
        outside = (1 - PERCENTILE / 100) * float(self.counts.sum())
        if symmetric:
            order = centres.abs().argsort()
            inside = self.counts[order].cumsum(0) <= float(self.counts.sum()) - outside
            bound = float(centres[order][inside].abs().max()) if bool(inside.any()) else float(centres.abs().min())
            bound += self.bound / _BINS
            return _range(max(self.low, -bound), min(self.high, bound), symmetric=True)
        kept = (self.counts.cumsum(0) > outside / 2) & (self.counts.flip(0).cumsum(0).flip(0) > outside / 2)
        half = self.bound / _BINS
        low, high = float(centres[kept].min()) - half, float(centres[kept].max()) + half
        return _range(max(self.low, min(low, 0.0)), min(self.high, max(high, 0.0)), symmetric=False)

    def _error(self, found: StaticRange, *, symmetric: bool) -> float:
        """Return the sum of squared errors of the counted values."""
        centres = self._centres()
        rounded = fake_quant.per_tensor(centres, found.step, found.zero, symmetric=symmetric)
        return float((self.counts * (rounded - centres).double().square()).sum())

    def _centres(self) -> Tensor:
        return (torch.arange(_BINS) + 0.5) * (2 * self.bound / _BINS) - self.bound


def _range(low: float, high: float, *, symmetric: bool) -> StaticRange:
    """Return the step and zero point that cover [low, high] with 8 bits; the step is a float32 number."""
    wide = max(-low, high) / 127 if symmetric else (high - low) / 255
    step = float(torch.tensor(max(wide, torch.finfo(torch.float32).tiny)))
    return StaticRange(step, 0 if symmetric else min(255, max(0, round(-low / step))))
