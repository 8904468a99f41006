"""Optimization profiles: which shapes an engine must serve, prefill and decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shapes = dict[str, tuple[list[int], list[int], list[int]]]
"""Smallest, typical and largest shape by input name."""


@dataclass(frozen=True)
class Limits:
    """What an engine must serve.

    Attributes:
        batch: Largest batch.
        sequence: Longest prompt that one call takes, in tokens.
        context: Longest context, cached tokens included.
    """

    batch: int = 1
    sequence: int = 512
    context: int = 1024

    def __post_init__(self) -> None:
        for name in ("batch", "sequence", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"max {name} is {getattr(self, name)}; it must be at least 1")
        if self.sequence > self.context:
            raise ValueError(
                f"max sequence {self.sequence} is longer than max context {self.context}; raise --max-context"
            )


def make_profiles(inputs: Mapping[str, Sequence[int | str]], limits: Limits) -> dict[str, Shapes]:
    """Return the profiles ``prefill`` (many new tokens, any past) and ``decode`` (one new token, any past).

    Args:
        inputs: Shape of every graph input; dynamic dimensions are strings.
        limits: What to serve.
    """
    # One token after the longest past still fits the context.
    longest_past = max(limits.context - 1, 1)
    ranges = {
        "prefill": {"sequence": (1, max(1, limits.sequence // 2), limits.sequence), "past": (0, 0, longest_past)},
        "decode": {"sequence": (1, 1, 1), "past": (0, max(1, limits.context // 2), longest_past)},
    }
    return {name: _shapes(inputs, limits, **spans) for name, spans in ranges.items()}


def _shapes(
    inputs: Mapping[str, Sequence[int | str]],
    limits: Limits,
    sequence: tuple[int, int, int],
    past: tuple[int, int, int],
) -> Shapes:
    total = (sequence[0] + past[0], sequence[1] + past[1], min(limits.context, sequence[2] + past[2]))
    batch = (1, 1, limits.batch)
    shapes: Shapes = {}
    for name, dimensions in inputs.items():
        spans = [
            (size, size, size)
            if isinstance(size, int)
            else _span(name, axis, batch=batch, sequence=sequence, past=past, total=total)
            for axis, size in enumerate(dimensions)
        ]
        shapes[name] = ([s[0] for s in spans], [s[1] for s in spans], [s[2] for s in spans])
    return shapes


def _span(name: str, axis: int, **spans: tuple[int, int, int]) -> tuple[int, int, int]:
    """The names of inputs follow the convention of Optimum and ONNX Runtime GenAI, so they say what an axis means."""
    if axis == 0:
        return spans["batch"]
    if name.startswith("past_key_values"):
        return spans["past"]
    return spans["total"] if name == "attention_mask" else spans["sequence"]
