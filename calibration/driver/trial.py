"""How long a run will take, before it runs: one block is tried with few windows and training steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.driver.block import BlockSolver, Site, Streams
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Reporter
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import ModelAdapter
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.placement import Placement, Stream, in_float32
from rankbook.calibration.training.reconstruct import TrainingOptions

_FEW, _MORE = 1, 4
"""Windows, and training steps, with which a block is tried."""
_LONG = 5.0
"""Seconds of a trial beside which what is made once in a process does not count."""


def seconds(
    adapter: ModelAdapter, layers: Sequence[Sequence[str]], options: QuantizeOptions, placement: Placement
) -> float:
    """Return about how long all blocks take, in wall time of this machine as it is busy now.

    Not in it: reading and writing the model, sampling text, embeddings, and spending the budget of ``target_bits``.

    Args:
        adapter: Of the original model; numbers of one block may change.
        layers: For each block the names of the layers to quantize.
        options: What is to be done.
        placement: Where it is computed.
    """
    blocks, config = adapter.blocks(), options.method_config()
    windows = options.calib_sequences if options.weighs_inputs() else 0
    steps = config.training_steps() if options.trains() and isinstance(config, TrainingOptions) else 0
    index = next(place for place, names in enumerate(layers) if names)
    site = Site(index, f"{blocks.name}.{index}.", blocks.modules[index], layers[index])
    length = min(options.calib_length, adapter.longest_text() or options.calib_length)
    tokens = torch.arange(_MORE * length).view(_MORE, length) % adapter.model.get_input_embeddings().num_embeddings
    trial = _Trial(adapter, site, replace(options, target_bits=None, allocate=("bits",)), placement, tokens)
    with torch.random.fork_rng(devices=[]):
        one = extrapolated(trial.seconds, windows, steps)
    return one * sum(map(_weights, blocks.modules, layers)) / _weights(site.block, site.layers)


def extrapolated(tried: Callable[[int, int], float], windows: int, steps: int) -> float:
    """Return how long a block takes with so many windows and training steps; its time is linear in both.

    Args:
        tried: Returns the seconds of a block with some windows and steps, or with none where a run has none.
        windows: Of the run.
        steps: Of the run.
    """
    few = (min(_FEW, windows), min(_FEW, steps))
    if (base := tried(*few)) < _LONG:
        base = tried(*few)
    for_window = max(0.0, tried(_MORE, few[1]) - base) / (_MORE - _FEW) if windows else 0.0
    for_step = max(0.0, tried(few[0], _MORE) - base) / (_MORE - _FEW) if steps else 0.0
    return base + for_window * (windows - few[0]) + for_step * (steps - few[1])


@dataclass(frozen=True)
class _Trial:
    """One block of a run.

    Attributes:
        adapter: Of the model.
        site: The block.
        options: Of the run, without a budget.
        placement: Where it is computed.
        tokens: As many windows as are tried at most.
    """

    adapter: ModelAdapter
    site: Site
    options: QuantizeOptions
    placement: Placement
    tokens: Tensor

    def seconds(self, windows: int, steps: int) -> float:
        """Return how long the block takes with so many windows and training steps."""
        few = {"steps": steps} if steps else {}
        options = replace(self.options, method_options={**self.options.method_options, **few})
        solver = BlockSolver(options, self.adapter.model.dtype, Reporter(1), self.placement)
        streams = self._streams(windows, trains=solver.trains()) if windows else Streams.none()
        start = time.monotonic()
        with in_float32(self.site.block, self.placement.device):
            if streams.targets is not None:
                self._advance(solver, streams.targets)
            solver.solve(self.site, streams)
            if windows:
                self._advance(solver, streams.inputs)
        return time.monotonic() - start

    def _advance(self, solver: BlockSolver, stream: Stream) -> None:
        with solver.arithmetic():
            capture.advance(self.site.block, self._entering[0][self.site.index], stream)

    def _streams(self, windows: int, *, trains: bool) -> Streams:
        calls, inputs = self._entering
        some = replace(inputs, values=inputs.values[:windows])
        return Streams(calls, some.copied(), some.copied() if trains else None, len(calls))

    @cached_property
    def _entering(self) -> tuple[Sequence[BlockCall], Stream]:
        """How the model calls its blocks, and what enters the first."""
        model, blocks, device = self.adapter.model, self.adapter.blocks(), self.placement.device
        dtype = next(blocks.modules[0].parameters()).dtype
        calls = capture.record_calls(model, blocks, self.tokens, device)
        return calls, capture.first_inputs(model, blocks, self.tokens, dtype, self.placement, calls)


def _weights(block: nn.Module, layers: Sequence[str]) -> int:
    """Return how many weights the layers of a block have."""
    found: list[Any] = [block.get_submodule(name) for name in layers]
    return sum(module.weight.numel() for module in found)
