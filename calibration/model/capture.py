"""Running a model block by block: the inputs of its decoder blocks, and the statistics of their layers.

Nothing here knows a family: how each block is called (`rankbook.calibration.model.calls`) is recorded while the model
itself runs with its blocks short-circuited. Blocks run one at a time, in float32; within a context of
autocast their matrix products take its dtype.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.device import moved
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.memory import beyond_share, relieve
from rankbook.calibration.model import calls
from rankbook.calibration.model.adapter import Blocks, adapter_of
from rankbook.calibration.model.calls import BlockCall, map_tensors
from rankbook.calibration.model.experts import matrix_of
from rankbook.calibration.model.packed_modules import PackedModule
from rankbook.calibration.model.placement import CPU, Placement, Stream, batch_size, batches, in_float32, placed
from rankbook.calibration.model.routed_inputs import RoutedInputs, inputs_of


def record_calls(model: nn.Module, blocks: Blocks, tokens: Tensor, device: torch.device = CPU) -> list[BlockCall]:
    """Record how the model calls each of its blocks, for windows as long as tokens (sequences, length).

    The blocks will compute on the device; tensors that several of them are given are there once. Where more flows
    between blocks than the hidden state, the model runs once with one sequence, to see what.

    Raises:
        ValueError: Blocks cannot run apart from the model: an argument differs between sequences in an unknown way.
    """
    one = tokens[:1]
    two = torch.cat([one.flip(1), one])
    with outside_in_float32(model, blocks):
        (single, alone), (pair, both) = _run_stubbed(model, blocks, one), _run_stubbed(model, blocks, two)
        merged = [calls.merge(*both, f"{blocks.name}.{i}") for i, both in enumerate(zip(single, pair, strict=True))]
        found = [call for call, _ in merged]
        if any(dependent for _, dependent in merged) or any(map(calls.shares, single)):
            seen = _seen(model, blocks, one, device)
            found = calls.flowing(found, [dependent for _, dependent in merged], seen, (alone, both), one.shape[1])
    there: dict[int, Tensor] = {}
    return [call.on(lambda tensor: there.setdefault(id(tensor), tensor.to(device))) for call in found]


@torch.no_grad()
def _seen(model: nn.Module, blocks: Blocks, tokens: Tensor, device: torch.device) -> list[calls.Seen]:
    """Return what each block is given and computes when the model itself runs."""
    seen: list[calls.Seen] = []
    keyword = adapter_of(model).hidden

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(calls.Seen(calls.arguments(calls.Call.of(args, kwargs, keyword), kwargs)))

    def leave(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen[-1].results.update(calls.results(output, kwargs))
        if len(seen) == len(blocks.modules):
            raise _StopForwardError

    with contextlib.ExitStack() as hooks:
        for block in blocks.modules:
            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(each_placed(blocks, device, torch.float32))
        for block in blocks.modules:
            hooks.enter_context(block.register_forward_hook(leave, with_kwargs=True))
        with contextlib.suppress(_StopForwardError):
            model(input_ids=tokens, use_cache=False)
    return seen


def first_inputs(
    model: nn.Module,
    blocks: Blocks,
    tokens: Tensor,
    dtype: torch.dtype,
    placement: Placement | None = None,
    found: Sequence[BlockCall] = (),
) -> Stream:
    """Return what enters the blocks: the first one's hidden state, and what else flows by the calls ``found``.

    It is in ``dtype`` if that holds it, on the CPU without a placement.

    Raises:
        ValueError: It is not finite.
    """
    layout = found[0].flow.layout if found and found[0].flow else None
    if layout is not None and layout.exact:
        dtype = torch.float32
    stream, begin = Stream(torch.empty(0, dtype=dtype), placement or Placement()), 0
    with outside_in_float32(model, blocks):
        for tokens_of_batch in torch.split(tokens, batch_size(tokens)):
            recorded, batch = _run_stubbed(model, blocks, tokens_of_batch, stop_early=layout is None)
            if layout is not None:
                batch = layout.wide(recorded, batch, tokens_of_batch.shape)
            if begin == 0:
                stream.values = stream.placement.empty((*tokens.shape, batch.shape[-1]), dtype)
            stream.write(begin, batch, "what stands before the blocks")
            begin += len(batch)
    return stream


@torch.no_grad()
def advance(block: nn.Module, call: BlockCall, stream: Stream, name: str = "the block") -> None:
    """Replace what is in a stream by the block's output.

    Raises:
        ValueError: The output is not finite; the message names the block ``name``.
    """
    begin = 0
    for batch in stream.batches():
        stream.write(begin, call(block, batch), name)
        begin += len(batch)


@torch.no_grad()
def entering(
    model: nn.Module, blocks: Blocks, module: nn.Module, tokens: Tensor, device: torch.device = CPU
) -> LayerStatistics:
    """Return the statistics of what enters a linear module that the model calls once, behind its blocks.

    Args:
        model: Computes in float32, whatever it is stored in; one block at a time is widened.
        blocks: Its blocks.
        module: The linear module, outside of them.
        tokens: (sequences, length).
        device: Where each block computes, and the statistics are.
    """
    found = LayerStatistics.empty(module.in_features, device)  # type: ignore[arg-type]

    def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.update(args[0].to(device))
        raise _StopForwardError

    with (
        outside_in_float32(model, blocks),
        each_placed(blocks, device, torch.float32),
        module.register_forward_pre_hook(note),
    ):
        for batch in torch.split(tokens, batch_size(tokens)):
            with contextlib.suppress(_StopForwardError):
                model(input_ids=batch, use_cache=False)
    return found


class BlockStatistics(Mapping[str, LayerStatistics]):
    """The statistics of the inputs of layers, by name: of experts computed when they are asked for."""

    def __init__(
        self, held: Mapping[str, LayerStatistics], routed: Mapping[str, tuple[RoutedInputs, str, int]]
    ) -> None:
        """Hold statistics; ``routed`` are the layers of experts: their inputs, matrix and number."""
        self._held, self._routed = held, routed

    def __getitem__(self, name: str) -> LayerStatistics:
        """Return the statistics of a layer; those of an expert are not kept."""
        if name in self._held:
            return self._held[name]
        inputs, matrix, expert = self._routed[name]
        return inputs.statistics(matrix, expert)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        return itertools.chain(self._held, self._routed)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._held) + len(self._routed)

    def add(self, other: BlockStatistics) -> None:
        """Become the statistics of the tokens of both; the other one may come from another process.

        Raises:
            RuntimeError: Layers that share their inputs in one of them do not in the other.
        """
        pairs = {(id(own), id(other._held[name])): (own, other._held[name]) for name, own in self._held.items()}
        # Layers that none of the other's tokens reached do not share there what they share here, and add nothing.
        pairs = {key: (own, more) for key, (own, more) in pairs.items() if more.tokens}
        if len(pairs) != len({own for own, _ in pairs}):
            raise RuntimeError("layers share their inputs in one part of the calibration text and not in another")
        for own, more in pairs.values():
            own.add(more)
        kept = {id(inputs): (inputs, other._routed[name][0]) for name, (inputs, _, _) in self._routed.items()}
        for inputs, further in kept.values():
            inputs.extend(further)

    def on(self, device: torch.device) -> BlockStatistics:
        """Return the statistics on a device; layers that share theirs do so there too."""
        there = {id(found): moved(found, device) for found in self._held.values()}
        return BlockStatistics({name: there[id(found)] for name, found in self._held.items()}, self._routed)

    def put_aside(self, placement: Placement) -> None:
        """Move the matrices into files where they take too much of a limit of memory; they are read from there.

        Raises:
            OSError: The disk has no room for them.
        """
        held = {id(found): found for found in self._held.values() if found.tokens and found.gram.device == CPU}
        if not beyond_share(sum(found.gram.nbytes for found in held.values())):
            return
        for found in held.values():
            found.gram = placement.in_file(tuple(found.gram.shape), found.gram.dtype).copy_(found.gram)
            relieve()

    def few_tokens(self) -> list[str]:
        """Return the names of the layers of experts that saw fewer tokens than they have inputs."""
        return [name for name, (inputs, matrix, expert) in self._routed.items() if inputs.is_scarce(matrix, expert)]


@torch.no_grad()
def collect(
    block: nn.Module, call: BlockCall, stream: Tensor, layers: Sequence[str], device: torch.device = CPU
) -> BlockStatistics:
    """Return the statistics of the inputs of the named layers while the stream runs through the block on its device.

    Layers that are given the same tensor (q, k and v; gate and up) share one statistics object. Those of parts of a
    stream can be added.
    """
    found = {name: matrix_of(name) for name in layers}
    modules: dict[str, Any] = {name: block.get_submodule(name) for name, matrix in found.items() if matrix is None}
    places = {name: (*matrix[0].rpartition(".")[::2], matrix[1]) for name, matrix in found.items() if matrix}
    keepers: dict[int, tuple[nn.Module, RoutedInputs]] = {}
    inputs: dict[tuple[str, str], RoutedInputs] = {}
    for owner, matrix, _ in places.values():
        if (owner, matrix) not in inputs:
            noted, kept = inputs_of(block.get_submodule(owner), matrix, device)
            inputs[owner, matrix] = keepers.setdefault(id(noted), (noted, kept))[1]
    statistics: dict[str, LayerStatistics] = {}
    owners: dict[str, str] = {}
    seen: list[tuple[Tensor, int, str]] = []

    def of(name: str) -> LayerStatistics:
        if name not in statistics:  # made when needed: those of a wide layer are large, and many layers share
            statistics[name] = LayerStatistics.empty(int(modules[name].weight.shape[1]), device)
        return statistics[name]

    def observe(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        # The tensors are kept until the batch ends, so that an address is never seen twice by chance.
        owner = next((o for tensor, version, o in seen if tensor is x and version == x._version), name)
        known = owners.setdefault(name, owner)
        if known == name:
            seen.append((x, x._version, name))
            of(name).update(x)
        elif owner != known:  # a layer whose input was shared in an earlier batch is given its own now
            raise RuntimeError(f"layer {name} shares its input with {known} in one batch and not in another")

    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(observe, name), with_kwargs=True))
        for noted, kept in keepers.values():
            hooks.enter_context(noted.register_forward_pre_hook(kept.note, with_kwargs=True))
        for batch in batches(stream, device):
            call(block, batch)
            seen.clear()
    held = {name: of(owners.get(name, name)) for name in modules}
    return BlockStatistics(held, {name: (inputs[place[:2]], *place[1:]) for name, place in places.items()})


@contextlib.contextmanager
def outside_in_float32(model: nn.Module, blocks: Blocks) -> Iterator[None]:
    """Compute in float32 what surrounds the blocks (norms, positions, projections), without copying embeddings.

    Embeddings keep their dtype and their rows are widened, which is exact; a factor on them is applied afterwards.
    """
    inside = {id(module) for block in blocks.modules for module in block.modules()}
    head = adapter_of(model).embeddings().head
    large = [m for m in model.modules() if isinstance(m, (nn.Embedding, PackedModule)) or (head and m is head[1])]
    inside |= {id(module) for module in large}
    others = [m for m in model.modules() if id(m) not in inside]
    with contextlib.ExitStack() as stack:
        for module in large:
            scaled = isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
            factor = adapter_of(model).embedding_scale(module) if scaled else None
            stack.enter_context(module.register_forward_hook(functools.partial(_in_full, factor)))
        for module in others:
            stack.enter_context(in_float32(module, recurse=False))
        yield


def _in_full(factor: float | None, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return the output of a layer in float32; ``factor`` is what an embedding multiplies its rows by, or None."""
    if factor is None:
        return output.float()
    return nn.functional.embedding(args[0], module.weight).float() * factor  # type: ignore[arg-type]


@contextlib.contextmanager
def each_placed(blocks: Blocks, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let every block compute on a device, in ``dtype`` or in its own; it is there only meanwhile."""
    with contextlib.ExitStack() as hooks:
        for block in blocks.modules:
            there = hooks.enter_context(contextlib.ExitStack())

            def enter(module: nn.Module, args: Any, kwargs: Any, there: contextlib.ExitStack = there) -> Any:
                there.enter_context(placed(module, device, dtype))
                return map_tensors(lambda _, value: value.to(device), (args, kwargs), ())

            def leave(_module: nn.Module, _args: Any, output: Any, there: contextlib.ExitStack = there) -> Any:
                there.close()
                return map_tensors(lambda _, value: value.cpu(), output, ())

            hooks.enter_context(block.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(leave))
        yield


class _StopForwardError(Exception):
    """Ends the model's forward once the blocks have been called."""


@contextlib.contextmanager
def _replaced_forwards(blocks: Blocks, stub: Callable[..., Any]) -> Iterator[None]:
    previous = [block.__dict__.get("forward") for block in blocks.modules]
    try:
        for block in blocks.modules:
            block.__dict__["forward"] = stub
        yield
    finally:
        for block, forward in zip(blocks.modules, previous, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _run_stubbed(
    model: nn.Module, blocks: Blocks, tokens: Tensor, *, stop_early: bool = False
) -> tuple[list[calls.Call], Tensor]:
    """Run the model with blocks that return their input; give their calls and what entered the first one."""
    recorded: list[calls.Call] = []
    entered: list[Tensor] = []
    last = 1 if stop_early else len(blocks.modules)
    forward = blocks.modules[0].forward
    rest: list[Any] = []
    keyword = adapter_of(model).hidden

    def stub(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs[keyword]
        recorded.append(calls.Call.of(args, kwargs, keyword))
        if len(recorded) == 1:
            entered.append(hidden)
        if len(recorded) == last:
            raise _StopForwardError
        if len(recorded) == 1:  # older classes return a tuple; only a real call tells
            with in_float32(blocks.modules[0]):
                output = forward(*args, **kwargs)
            rest.extend(output[1:] if isinstance(output, tuple) else [None])
            rest.insert(0, isinstance(output, tuple))
        return (hidden, *rest[1:]) if rest[0] else hidden

    with _replaced_forwards(blocks, stub), torch.no_grad(), contextlib.suppress(_StopForwardError):
        model(input_ids=tokens, use_cache=False)
    if len(recorded) != last:
        raise ValueError(
            f"{type(model).__name__} called {len(recorded)} of its {last} blocks; it cannot run block by block"
        )
    return recorded, entered[0]
