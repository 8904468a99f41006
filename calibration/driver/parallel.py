"""Blocks solved with what the original model gives: none waits for another, so that a cluster solves several at once.

What the quantized blocks before it change is not seen by a block, and it does not make up for it (docs/cluster.md has
what that costs). In one process the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rankbook.calibration.driver.allocation import Choice
from rankbook.calibration.driver.block import BlockSolver, Site, Streams
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Reporter
from rankbook.calibration.driver.resume import BlockResult, PartialState
from rankbook.calibration.memory import relieve
from rankbook.calibration.model import capture
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.placement import Placement, Stream, in_float32
from rankbook.calibration.record.finite import check_parameters


@dataclass(frozen=True)
class BlockTask:
    """A block to solve, in float32.

    Attributes:
        site: The block.
        call: How the model calls it.
        inputs: What enters it in the original model, (sequences, length, hidden).
        targets: What it gives there; None where nothing is trained.
        options: What to do.
        dtype: Of the model.
        choices: See `rankbook.calibration.driver.block.BlockSolver`.
        reporter: Told of every layer.
    """

    site: Site
    call: BlockCall
    inputs: torch.Tensor
    targets: torch.Tensor | None
    options: QuantizeOptions
    dtype: torch.dtype
    choices: Mapping[str, Choice]
    reporter: Reporter

    def solved(self, placement: Placement) -> BlockResult:
        """Return the result; the block, its call and the streams are brought to the device."""
        device, solver = placement.device, BlockSolver(self.options, self.dtype, self.reporter, placement, self.choices)
        calls = {self.site.index: self.call.on(lambda tensor: tensor.to(device))}
        targets = None if self.targets is None else Stream(self.targets, placement)
        with in_float32(self.site.block, device):
            return solver.solve(self.site, Streams(calls, Stream(self.inputs, placement), targets, 0))


def solve_side_by_side(sites: Sequence[Site], streams: Streams, solver: BlockSolver, state: PartialState) -> None:
    """Solve every block that ``state`` does not hold, and store it there.

    Args:
        sites: All blocks, in their order.
        streams: What enters the first one in the original model.
        solver: How, and on which cluster.
        state: Of the run.

    Raises:
        ValueError: Weights or activations are not finite.
    """
    waiting = [site.index for site in sites if not state.holds(site.index)]
    done = len(sites) - len(waiting)
    tasks = _tasks(sites[: max(waiting, default=-1) + 1], set(waiting), streams, solver)
    for index, result in solver.executor.solve_blocks(tasks):
        state.save(index, result)
        done += 1
        solver.reporter.tell(f"solved block {index}", done - 1, 1.0)


def _tasks(sites: Sequence[Site], wanted: set[int], streams: Streams, solver: BlockSolver) -> Iterator[BlockTask]:
    """Yield the wanted blocks while the original model runs: each is in float32 until the next one is asked for."""
    placement, inputs = solver.placement, streams.inputs
    for site in sites:
        check_parameters(site.block, site.prefix)
        what, call = f"block {site.prefix[:-1]}", streams.calls[site.index]
        with (
            placement.enough_memory(site.prefix[:-1], site.block, [inputs.values]),
            in_float32(site.block, placement.device),
        ):
            outputs = inputs.copied()
            with solver.arithmetic():
                capture.advance(site.block, call, outputs, f"{what} of the original model")
            if site.index in wanted:
                targets = outputs.values if solver.trains() else None
                given = (solver.options, solver.dtype, solver.choices, solver.reporter)
                yield BlockTask(site, call, inputs.values, targets, *given)
        inputs = outputs
        relieve()
