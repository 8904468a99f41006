"""How a model calls its blocks, and what flows from block to block.

In most models that is the hidden state alone. Elsewhere blocks are given arguments that depend on the tokens (features
of them in Gemma 3n and 4, the embedded tokens in Zamba 2), or what an earlier block has computed (keys and values in
Gemma 3n, the chosen keys in GLM 5). Such tensors lie behind the hidden state as further features of each token, so that
a stream of calibration activations is one tensor (sequences, length, width) in every model.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[Any, ...]
"""Where a tensor is among the arguments of a block (``args`` or ``kwargs`` first) or its results (``output``)."""


@dataclass(frozen=True)
class Call:
    """Arguments of a block as they were recorded, without the hidden state.

    Attributes:
        args: Positional ones.
        kwargs: Keyword arguments; what blocks share in a mapping is left out.
        keyword: Name under which the hidden state is passed, empty if it is the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str = ""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], keyword: str) -> Call:
        """Return the call of a block; ``keyword`` is the hidden state's where it is not positional."""
        kept = {name: type(value)() if isinstance(value, UserDict) else value for name, value in kwargs.items()}
        if args:
            return cls(args[1:], kept)
        del kept[keyword]
        return cls((), kept, keyword)


@dataclass(frozen=True)
class Slot:
    """Features of each token in a stream, and the tensor that a block knows them as.

    Attributes:
        begin: The first feature.
        shape: Sizes of the axes of the tensor, without those of sequences and positions.
        axes: Its axes of sequences and of positions.
        dtype: Its type where it does not hold floating-point elements, else None.
    """

    begin: int
    shape: tuple[int, ...]
    axes: tuple[int, int]
    dtype: torch.dtype | None

    @classmethod
    def of(cls, value: Tensor, axes: tuple[int, int], begin: int) -> Slot:
        """Return the slot of tensors like ``value``."""
        shape = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
        return cls(begin, shape, axes, None if value.is_floating_point() else value.dtype)

    @property
    def end(self) -> int:
        """One behind the last feature."""
        return self.begin + math.prod(self.shape)

    def read(self, wide: Tensor) -> Tensor:
        """Return the tensor from a piece of a stream (sequences, length, width)."""
        found = wide[..., self.begin : self.end].reshape(*wide.shape[:2], *self.shape).movedim((0, 1), self.axes)
        return found if self.dtype is None else found.to(self.dtype)

    def write(self, wide: Tensor, value: Tensor) -> None:
        """Put a tensor into a piece of a stream."""
        wide[..., self.begin : self.end] = value.movedim(self.axes, (0, 1)).reshape(*wide.shape[:2], -1)


@dataclass(frozen=True)
class Layout:
    """The features of each token in a stream that holds more than hidden states.

    Attributes:
        hidden: The hidden state; it comes first.
        entering: What enters the blocks from outside of them: number of a block that is given it, where, and its slot.
        width: Of the stream.
        exact: Whether some features are whole numbers, which need float32.
    """

    hidden: Slot
    entering: tuple[tuple[int, Path, Slot], ...]
    width: int
    exact: bool

    def wide(self, calls: Sequence[Call], hidden: Tensor, shape: Sequence[int]) -> Tensor:
        """Return what enters the first block: a piece (sequences, length, width) of a stream, float32."""
        values = hidden.new_zeros(*shape, self.width, dtype=torch.float32)
        self.hidden.write(values, hidden)
        for block, path, slot in self.entering:
            slot.write(values, dict(leaves(calls[block]))[path])
        return values


@dataclass(frozen=True)
class Flow:
    """Which features of a stream a block is given and changes, beside the hidden state."""

    layout: Layout
    given: Mapping[Path, Slot]
    kept: Mapping[Path, Slot]


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: every argument but the hidden state, recorded for one sequence.

    Attributes:
        args: Further positional arguments.
        kwargs: Keyword arguments.
        repeats: Paths of the tensors whose first dimension counts sequences, and how many rows each has for one.
        keyword: Name under which the hidden state is passed, empty if it is the first positional argument.
        flow: What else flows, in models where that is not the hidden state alone.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    repeats: frozenset[Path]
    keyword: str = ""
    flow: Flow | None = None

    @property
    def hidden(self) -> int | None:
        """Features of a stream that are the hidden state; None for all of them."""
        return None if self.flow is None else self.flow.layout.hidden.end

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """Return the block's output for x (batch, length, width); gradients flow."""
        given = {} if self.flow is None else self.flow.given

        def grow(path: Path, value: Tensor) -> Tensor:
            if path in given:
                return given[path].read(x)
            return _repeat(value, x.shape[0]) if path in self.repeats else value

        args = map_tensors(grow, self.args, ("args",))
        kwargs = map_tensors(grow, self.kwargs, ("kwargs",))
        kwargs |= {name: type(value)() for name, value in kwargs.items() if isinstance(value, UserDict)}
        for path, slot in given.items():
            _put(kwargs, path, slot.read(x))
        hidden = x if self.flow is None else self.flow.layout.hidden.read(x)
        output = block(**{self.keyword: hidden}, **kwargs) if self.keyword else block(hidden, *args, **kwargs)
        if self.flow is None:
            return first(output)
        wide = x.clone()
        self.flow.layout.hidden.write(wide, first(output))
        after = results(output, kwargs)
        for path, slot in self.flow.kept.items():
            slot.write(wide, after[path])
        return wide

    def on(self, move: Callable[[Tensor], Tensor]) -> BlockCall:
        """Return the call with every tensor moved."""
        args, kwargs = (map_tensors(lambda _, value: move(value), held, ()) for held in (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


@dataclass(frozen=True)
class Seen:
    """What a block was given and what it computed when the model itself ran, as tensors by path."""

    given: Mapping[Path, Tensor]
    results: dict[Path, Tensor] = field(default_factory=dict)


def merge(single: Call, pair: Call, name: str) -> tuple[BlockCall, dict[Path, tuple[Tensor, int]]]:
    """Compare the calls for one and for two sequences.

    Returns:
        The call, and the tensors in it that depend on the tokens, each with its axis of sequences.

    Raises:
        ValueError: An argument differs between the calls in another way.
    """
    paired = dict(leaves(pair))
    repeats, dependent = set(), {}
    for path, value in leaves(single):
        other = paired.get(path)
        if other is None:
            raise ValueError(f"{name} is called with {path[-1]!r} at times; not supported")
        if other.shape == value.shape and torch.equal(other, value):
            continue
        if other.shape != value.shape and torch.equal(other, _repeat(value, 2)):
            repeats.add(path)
        else:
            dependent[path] = value, _grown(value, other, f"{name} is called with {path[-1]!r}")

    def kept(path: Path, value: Tensor) -> Tensor:
        return value.new_empty(0) if path in dependent else value.float() if value.is_floating_point() else value

    args, kwargs = map_tensors(kept, single.args, ("args",)), map_tensors(kept, single.kwargs, ("kwargs",))
    return BlockCall(args, kwargs, frozenset(repeats), single.keyword), dependent


def _grown(value: Tensor, other: Tensor, what: str) -> int:
    """Return the axis that is longer with two sequences than with one."""
    sizes = zip(value.shape, other.shape, strict=value.ndim == other.ndim)
    longer = [axis for axis, (one, two) in enumerate(sizes) if one != two]
    if value.ndim != other.ndim or len(longer) != 1 or other.shape[longer[0]] != 2 * value.shape[longer[0]]:
        raise ValueError(f"{what} that differs between sequences; this model is not supported")
    return longer[0]


def flowing(
    calls: Sequence[BlockCall],
    dependent: Sequence[Mapping[Path, tuple[Tensor, int]]],
    seen: Sequence[Seen],
    hidden: tuple[Tensor, Tensor],
    length: int,
) -> list[BlockCall]:
    """Return calls of blocks between which more flows than the hidden state.

    Args:
        calls: The calls.
        dependent: Of each block the tensors that depend on the tokens, as `merge` returns them.
        seen: Of each block what it was given and computed with one sequence.
        hidden: What enters the first block, with one sequence and with two.
        length: Tokens of a sequence.

    Raises:
        ValueError: A tensor has no axis of positions, the model computes one between blocks, or a block is given what
            no longer is there.
    """
    carried = _carried(seen)
    slots: dict[Any, Slot] = {}

    def slot(key: Any, value: Tensor, batch: int, what: str) -> Slot:
        axes = batch, next((axis for axis in range(batch + 1, value.ndim) if value.shape[axis] == length), -1)
        if axes[1] < 0:
            raise ValueError(f"{what} that depends on the tokens and has no axis of positions; not supported")
        there = slots.setdefault(key, Slot.of(value, axes, max((found.end for found in slots.values()), default=0)))
        if Slot.of(value, axes, there.begin) != there:
            raise ValueError(f"{what} that has another shape or type than in an earlier block; not supported")
        return there

    start = slot("", hidden[0], _grown(*hidden, "the first block is called with a hidden state"), "the hidden state")
    entering: dict[int, tuple[int, Path, Slot]] = {}
    given: list[dict[Path, Slot]] = []
    for block, found in enumerate(dependent):
        what = f"block {block} is called with"
        given.append({path: slot(path, seen[block].given[path], 0, f"{what} {path[1]!r}") for path in carried[block]})
        for path, (value, batch) in found.items():
            if path not in carried[block]:
                given[block][path] = slot(id(value), value, batch, f"{what} {path[-1]!r}")
                _check_outside(value, seen[block].given.get(path), f"{what} {path[-1]!r}")
                entering.setdefault(id(value), (block, path, given[block][path]))
    kept: list[dict[Path, Slot]] = [{} for _ in calls]
    for reader, paths in enumerate(carried):
        for path, (block, result) in paths.items():
            if kept[block].setdefault(result, given[reader][path]) != given[reader][path]:
                raise ValueError(f"what block {block} computes is given to blocks under two names; not supported")
    _check_order(carried, kept, given)
    every = list(slots.values())
    layout = Layout(start, tuple(entering.values()), every[-1].end, any(one.dtype is not None for one in every))
    return [replace(call, flow=Flow(layout, *both)) for call, *both in zip(calls, given, kept, strict=True)]


def _carried(seen: Sequence[Seen]) -> list[dict[Path, tuple[int, Path]]]:
    """Return for each block which of the tensors it is given a block has computed, with the number of that block.

    By whom first: a block may hand on what it was given, by an earlier one or from outside.
    """
    made: dict[int, tuple[int, Path]] = {}
    outside: set[int] = set()
    carried: list[dict[Path, tuple[int, Path]]] = []
    for block, one in enumerate(seen):
        carried.append({path: made[id(tensor)] for path, tensor in one.given.items() if id(tensor) in made})
        outside |= {id(tensor) for tensor in one.given.values()} - made.keys()
        for path, tensor in one.results.items():
            if id(tensor) not in outside:
                made.setdefault(id(tensor), (block, path))
    return carried


def _check_outside(value: Tensor, when_run: Tensor | None, what: str) -> None:
    """Check that a tensor is the same where the blocks are short-circuited as in the model itself.

    Raises:
        ValueError: It is not: it depends on what blocks before it compute, and would never be right.
    """
    if when_run is not None and when_run.shape == value.shape:
        near = 1e-5 * float(value.abs().max()) if value.is_floating_point() else 0.0
        if torch.allclose(value.double(), when_run.to(value.device).double(), rtol=0.0, atol=near):
            return
    raise ValueError(f"{what} that the model computes from what earlier blocks give; not supported")


def _check_order(
    carried: Sequence[Mapping[Path, tuple[int, Path]]],
    kept: Sequence[Mapping[Path, Slot]],
    given: Sequence[Mapping[Path, Slot]],
) -> None:
    """Check that what a block is given is what was written last."""
    for reader, paths in enumerate(carried):
        for path, (block, _) in paths.items():
            between = range(block + 1, reader)
            if any(given[reader][path] in kept[other].values() for other in between):
                raise ValueError(
                    f"block {reader} is given {path[1]!r} of block {block}, and others come between; not supported"
                )


def results(output: Any, kwargs: Mapping[str, Any]) -> dict[Path, Tensor]:
    """Return what a block computed beside its hidden state: further results, and what it put into a shared mapping."""
    several = enumerate(output) if isinstance(output, (tuple, list)) else ()
    found: dict[Path, Tensor] = {("output", i): item for i, item in several if i and isinstance(item, Tensor)}
    return found | dict(_shared(kwargs))


def arguments(call: Call, kwargs: Mapping[str, Any]) -> dict[Path, Tensor]:
    """Return every tensor that a block was given beside its hidden state, those in a shared mapping too."""
    return dict(leaves(call)) | dict(_shared(kwargs))


def shares(call: Call) -> bool:
    """Return whether a block was given a mapping in which blocks leave tensors for others."""
    return any(isinstance(value, UserDict) for value in call.kwargs.values())


def _shared(kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    for name, value in kwargs.items():
        if isinstance(value, UserDict):
            for key, kept in value.items():
                yield from ((("kwargs", name, key, place), tensor) for place, tensor in enumerate(kept))


def _put(kwargs: dict[str, Any], path: Path, value: Tensor) -> None:
    """Put a tensor where no tensor was recorded: under a name of its own, or into a shared mapping, in order."""
    if len(path) == 2 and path[0] == "kwargs":
        kwargs[path[1]] = value
    elif path[0] == "kwargs" and isinstance(kwargs[path[1]], UserDict):
        kwargs[path[1]].setdefault(path[2], []).append(value)


def first(output: Any) -> Tensor:
    """Return the hidden state of a block's output, which may stand first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def map_tensors(function: Callable[[Path, Tensor], Any], value: Any, path: Path) -> Any:
    """Apply a function of path and tensor to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item, (*path, key)) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item, (*path, i)) for i, item in enumerate(value))
    return value


def leaves(call: Call) -> list[tuple[Path, Tensor]]:
    """Return the tensors among arguments, with their paths."""
    found: list[tuple[Path, Tensor]] = []
    for name in ("args", "kwargs"):
        map_tensors(lambda where, tensor: found.append((where, tensor)), getattr(call, name), (name,))
    return found


def _repeat(value: Tensor, times: int) -> Tensor:
    if value.shape[0] == 1:
        return value.expand(times, *value.shape[1:])
    return value.repeat(times, *[1] * (value.ndim - 1))
