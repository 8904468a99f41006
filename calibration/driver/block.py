"""Solving one block: statistics of its inputs, input scaling, the closed form of each layer, the training stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.activations.settings import in_block
from rankbook.calibration.driver import scaling
from rankbook.calibration.driver.allocation import Choice
from rankbook.calibration.driver.cluster_options import PARALLEL
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.report import Reporter, output_errors
from rankbook.calibration.driver.resume import BlockResult
from rankbook.calibration.driver.solve import Executor, InProcess, LayerTask, Passage, Solved
from rankbook.calibration.fitting.grids import Grid
from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.methods import METHODS
from rankbook.calibration.model import capture
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.experts import matrix_of
from rankbook.calibration.model.packed_modules import CodebookLinear
from rankbook.calibration.model.placement import Placement, Stream
from rankbook.calibration.record.quantized_linear import QuantizedLinear
from rankbook.calibration.threads import SMALL
from rankbook.calibration.training.reconstruct import arithmetic, compute_dtype

_QUANTIZE_SHARE = 0.3
"""Share of a block's time that its closed-form solution takes where a training stage follows; only for the estimate."""


@dataclass(frozen=True)
class Streams:
    """Calibration activations, moved from block to block in place.

    Attributes:
        calls: How the model calls each block, by its number.
        inputs: Of the quantized prefix; of the original one where blocks are solved in parallel.
        targets: Of the original model, or None for methods without a training stage.
        end: Number of blocks that the streams must pass; 0 where no block is left to quantize, or none needs inputs.
    """

    calls: Sequence[BlockCall] | Mapping[int, BlockCall]
    inputs: Stream
    targets: Stream | None
    end: int

    @classmethod
    def none(cls) -> Streams:
        """Return those of a run that needs no inputs."""
        return cls((), Stream(torch.empty(0)), None, 0)


@dataclass(frozen=True)
class Site:
    """One block of a model.

    Attributes:
        index: Its number.
        prefix: Its name in the model, with a dot at the end.
        block: The block.
        layers: Names of the layers to quantize, within the block.
    """

    index: int
    prefix: str
    block: nn.Module
    layers: Sequence[str]


@dataclass(frozen=True)
class BlockSolver:
    """Quantizes blocks one after another.

    Attributes:
        options: What to do.
        dtype: Of the model: norms are stored in it.
        reporter: Told of every layer.
        placement: Where it is computed.
        choices: Bits and ranks of layers where a budget chose them; elsewhere the options hold.
        elsewhere: What solves the layers in the place of this process.
    """

    options: QuantizeOptions
    dtype: torch.dtype
    reporter: Reporter
    placement: Placement
    choices: Mapping[str, Choice] = field(default_factory=dict)
    elsewhere: Executor | None = None

    @property
    def executor(self) -> Executor:
        """What solves the layers."""
        return self.elsewhere or InProcess(self.placement.devices)

    def options_of(self, name: str) -> QuantizeOptions:
        """Return what holds for a layer by its full name: the choice of a budget, or what the options say."""
        choice = self.choices.get(name)
        return self.options.of_layer(name) if choice is None else choice.applied(self.options)

    def trains(self) -> bool:
        """Return whether blocks are trained."""
        return self.options.trains()

    def in_parallel(self) -> bool:
        """Return whether blocks are solved with what the original blocks give."""
        return self.options.order == PARALLEL and self.options.weighs_inputs()

    def follows_original(self) -> bool:
        """Return whether what flows through the original model is needed."""
        return self.trains() or self.in_parallel()

    def streams(self) -> int:
        """Return how many streams are held: in parallel what enters the first block, and the present one's two."""
        return 3 if self.in_parallel() else 2 if self.follows_original() else 1

    def arithmetic(self) -> AbstractContextManager[object]:
        """Return the context of the calibration passes: they compute in what the blocks are trained in.

        SmolLM2-135M, LCQ at 3 bits (16 x 512 tokens, 40 steps), error after four blocks on other text: 0.01365 and
        0.01394 (two seeds) with passes in float32, 0.01407 and 0.01377 in bfloat16, in half their CPU time.
        """
        return arithmetic(self._compute(), self.placement.device)

    def _compute(self) -> torch.dtype:
        compute = getattr(self.options.method_config(), "compute", "float32") if self.trains() else "float32"
        return compute_dtype(compute, self.placement.device)

    def solve(self, site: Site, streams: Streams) -> BlockResult:
        """Return the records of one block in float32."""
        block, prefix, device = site.block, site.prefix, self.placement.device
        method, options = METHODS[self.options.method], self.options
        statistics = self._statistics(site, streams)

        def first_output() -> Tensor:
            return streams.calls[site.index](block, streams.inputs.values[:1].to(device, torch.float32))

        scaled = self._scale_inputs(site, first_output, statistics)
        share = _QUANTIZE_SHARE if streams.targets is not None else 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + site.index)
            solved = self._closed_forms(site, statistics, share)
            records = {name: record for name, (record, _) in solved.items()}
            errors = {name: error for name, (_, error) in solved.items()}
            if method.refine is not None and streams.targets is not None and records:
                statistics.put_aside(self.placement)
                records = self._trained(site, streams, streams.targets, records)
                errors = {
                    name: output_errors(self._problem(site, name, statistics), record)
                    for name, record in records.items()
                }
        return BlockResult(
            {f"{prefix}{name}": CodebookLinear.from_record(record) for name, record in records.items()},
            {f"{prefix}{name}": error for name, (error, _) in errors.items()},
            {f"{prefix}{name}": tensor.to(self.dtype) for name, tensor in scaled.tensors.items()},
            [f"{prefix}{name}" for name in scaled.layers],
            [f"{prefix}{name}" for name in statistics.few_tokens()],
            {f"{prefix}{name}": bare for name, (_, bare) in errors.items() if bare is not None},
        )

    def _trained(
        self, site: Site, streams: Streams, targets: Stream, records: dict[str, QuantizedLinear]
    ) -> dict[str, QuantizedLinear]:
        """Train the records of a block, around those to which a rule gave another method."""
        options, refine = self.options, METHODS[self.options.method].refine
        fixed = {n: r for n, r in records.items() if options.of_layer(f"{site.prefix}{n}").method != options.method}
        if refine is None or len(fixed) == len(records):
            return records
        given = {name: record for name, record in records.items() if name not in fixed}
        layers = {name: _problem(site.block, name, unseen) for name, unseen in self._unseen(site).items()}
        progress, seed = _refine_progress(self.reporter, site.index), options.seed + site.index
        call, inputs = streams.calls[site.index], streams.inputs.values
        layers = {name: layers[name] for name in given}
        own = {name: options.of_layer(f"{site.prefix}{name}") for name in given}
        configs = {name: chosen.method_config() for name, chosen in own.items() if chosen is not options}

        def forward(block: nn.Module, x: Tensor) -> Tensor:
            return call(block, x)[..., : call.hidden]

        wanted = targets.values[..., : call.hidden]
        problem = BlockProblem(site.block, layers, inputs, wanted, forward, seed, progress, configs)
        with self.rounded_inputs(site, streams), _decoded(site.block, fixed):
            return records | refine(problem, given, options.method_config())

    def _closed_forms(self, site: Site, statistics: Mapping[str, LayerStatistics], share: float) -> dict[str, Solved]:
        """Solve every layer, and measure its error while its statistics are at hand."""

        def task(name: str) -> LayerTask:
            full = f"{site.prefix}{name}"
            alone = _is_small(site.block, name)
            return LayerTask(full, self.options_of(full), lambda: self._problem(site, name, statistics), alone)

        def tell(stage: str, done: float) -> None:
            self.reporter.tell(stage, site.index, share * done)

        names = list(site.layers)
        return dict(zip(names, self.executor.solve(list(map(task, names)), tell), strict=True))

    def _problem(self, site: Site, name: str, statistics: Mapping[str, LayerStatistics]) -> LayerProblem:
        """Return the problem of a layer; the statistics of one of an expert are computed here."""
        with self.arithmetic():
            return _problem(site.block, name, statistics[name])

    def rounded_inputs(self, site: Site, streams: Streams) -> AbstractContextManager[None]:
        """Quantize what enters a block's layers, in training and in the stream that follows it."""
        if streams.targets is None:  # nothing is trained
            return nullcontext()

        def run() -> None:
            for batch in streams.inputs.batches():
                streams.calls[site.index](site.block, batch)

        return in_block(site.block, site.prefix, site.layers, run, self.options)

    def _statistics(self, site: Site, streams: Streams) -> capture.BlockStatistics:
        """Return what enters each layer: the sum over the parts of the text, of which the first is computed here."""
        if not self.options.weighs_inputs():
            return capture.BlockStatistics(self._unseen(site), {})
        passage = Passage(site.index, site.block, streams.calls[site.index], site.layers, self._compute())
        values = streams.inputs.values
        first, *others = torch.split(values, -(-len(values) // self.options.calib_shards))
        with self.executor.collecting(passage, others) as further:
            found = passage.statistics(first, self.placement.device)
            for part in further:
                found.add(part)
        return found

    def _unseen(self, site: Site) -> dict[str, LayerStatistics]:
        widths: dict[str, Any] = {name: site.block.get_submodule(name).in_features for name in site.layers}
        return {name: LayerStatistics.unseen(width, self.placement.device) for name, width in widths.items()}

    def _scale_inputs(
        self, site: Site, run: Callable[[], Tensor], statistics: Mapping[str, LayerStatistics]
    ) -> scaling.Scaled:
        block, prefix, options, kind = site.block, site.prefix, self.options, self.options.scaling()
        if kind == "none":
            return scaling.Scaled()

        def grid(problem: LayerProblem) -> Grid:
            return self.options_of(f"{prefix}{problem.name}").grid(problem.weight.shape[1])

        choose = scaling.chooser(kind, grid, options.scale_strength)
        # What enters an expert is also given to the router, and to the other experts: nothing could carry a scaling.
        alone = {name: statistics[name] for name in statistics if not matrix_of(name)}
        return scaling.scale_inputs(block, run, alone, choose, self.dtype)


@contextmanager
def _decoded(block: nn.Module, records: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Let layers of a block compute with the weights of their records: those that are done while others are trained."""
    layers: dict[str, Any] = {name: block.get_submodule(name) for name in records}
    before = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = nn.Parameter(records[name].weight(with_low_rank=True), requires_grad=False)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = before[name]


def _is_small(block: nn.Module, name: str) -> bool:
    """Return whether a layer is solved on one thread; one of an expert is not, whose statistics are computed first."""
    weight: Any = block.get_submodule(name).weight
    return matrix_of(name) is None and weight.numel() <= SMALL


def _problem(block: nn.Module, name: str, statistics: Any) -> LayerProblem:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is {type(module).__name__}, not a linear layer")
    bias = module.bias.detach().clone() if module.bias is not None else None
    return LayerProblem(name, module.weight.detach(), bias, statistics)


def _refine_progress(reporter: Reporter, index: int) -> Callable[[float], None]:
    def tell(fraction: float) -> None:
        reporter.tell("training", index, _QUANTIZE_SHARE + (1 - _QUANTIZE_SHARE) * fraction)

    return tell
