"""Low-bit keys and values as the papers evaluate them: before the rotary embedding, rounded in floating point.

Each token has one range per key head (asymmetric, as LRQ, Lee et al. 2024, official code, which takes one over all
heads). What an engine does is another thing: it stores keys after the rotary embedding, see
`rankbook.exporter.passes.kv_cache`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankbook.calibration.activations import fake_quant
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.settings import KV_BITS

_HOOK = "_rankbook_kv_hook"


def check_bits(bits: int) -> None:
    """Check a width.

    Raises:
        ValueError: It is not one of `KV_BITS`.
    """
    if bits not in KV_BITS:
        raise ValueError(f"keys and values in {bits} bits are not supported; choose 8 or 4, or 0 to leave them alone")


def install(model: Any, bits: int) -> None:
    """Quantize the keys and values of a causal language model from now on; an earlier setting is replaced.

    Raises:
        ValueError: Another number of bits, or a model whose projections are laid out in an unknown way.
    """
    check_bits(bits)
    for module in model.modules():
        if (earlier := module.__dict__.pop(_HOOK, None)) is not None:
            earlier.remove()
    if bits:
        adapter = adapter_of(model)
        for output in adapter.cached_outputs():
            hook = _OutputHook(bits, output.start, adapter.head_size)
            output.module.__dict__[_HOOK] = output.module.register_forward_hook(hook)


@dataclass(frozen=True)
class _OutputHook:
    """A forward hook on a projection; a class, so that models that have it can be copied and pickled.

    Attributes:
        bits: Width.
        start: First output feature that belongs to keys or values.
        head_size: Features of one head.
    """

    bits: int
    start: int
    head_size: int

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        part = output[..., self.start :]
        rounded = fake_quant.per_token(part.reshape(*part.shape[:-1], -1, self.head_size), self.bits).flatten(-2)
        if self.start == 0:
            return rounded
        result = output.clone()
        result[..., self.start :] = rounded
        return result
