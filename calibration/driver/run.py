"""Quantizing a whole model block by block, with one block's working set in memory besides the memory-mapped weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankbook.calibration.activations.settings import chosen_settings
from rankbook.calibration.checkpoint.format import MANIFEST, write_checkpoint
from rankbook.calibration.checkpoint.output import check_replaceable, locked
from rankbook.calibration.data import CalibrationData, calibration_batches
from rankbook.calibration.driver import embeddings
from rankbook.calibration.driver.allocation import Choice, allocate
from rankbook.calibration.driver.block import BlockSolver, Site, Streams
from rankbook.calibration.driver.cluster import Cluster, connected
from rankbook.calibration.driver.estimate import memory, planned_specs
from rankbook.calibration.driver.options import QuantizeOptions
from rankbook.calibration.driver.parallel import solve_side_by_side
from rankbook.calibration.driver.parts import checkpoint_parts
from rankbook.calibration.driver.report import (
    LayerReport,
    Plan,
    Progress,
    QuantizeReport,
    Reporter,
    in_float,
    is_coarse,
    outside,
    totals,
)
from rankbook.calibration.driver.resume import PartialState, fingerprint
from rankbook.calibration.driver.selection import Selection, select
from rankbook.calibration.driver.trial import seconds
from rankbook.calibration.driver.unused import note_unused
from rankbook.calibration.fitting.statistics import LayerStatistics
from rankbook.calibration.memory import limited, peak_rss_bytes, relieve
from rankbook.calibration.model import capture
from rankbook.calibration.model.adapter import Blocks, Embeddings, ModelAdapter, adapter_of
from rankbook.calibration.model.calls import BlockCall
from rankbook.calibration.model.loading import load_model, model_hash, resolve, source_folder
from rankbook.calibration.model.packed_modules import packed_modules, replace_module
from rankbook.calibration.model.placement import Placement, Stream, in_float32, within_range
from rankbook.calibration.model.plain import make_plain, restore
from rankbook.calibration.notes import note
from rankbook.calibration.record.finite import check_parameters
from rankbook.calibration.source import Kind, hub_origin
from rankbook.plugins.layer_spec import LayerSpec

_FINER = "input scaling does that: give --param-bits 16"
_HEAD_TOKENS = 8192
"""Calibration tokens that run through the original model to say what enters its output layer."""


def quantize_model(
    source: str | Path,
    output_dir: str | Path,
    options: QuantizeOptions,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    begin: Callable[[Any, Plan], None] | None = None,
) -> QuantizeReport:
    """Quantize a causal language model and write the checkpoint.

    >>> options = rankbook.QuantizeOptions(method="rtn", bits=4, calib="text.txt", calib_sequences=2, calib_length=32)
    >>> report = rankbook.quantize("model", "checkpoint", options)
    >>> len(report.layers), 4 < report.bits_per_weight < 8
    (14, True)

    Memory: the weights once (memory-mapped, in their own dtype), one block in float32, and two streams of calibration
    activations (sequences, length, hidden) in the model's dtype: the original model's, which gives the targets, and the
    quantized prefix's, which gives the inputs and statistics. Methods without a training stage need only the second.
    Where activations leave the range of fp16, the streams become float32. The weights stay where they are; the block
    and, while they fit, the streams are on ``options.device``.

    Args:
        source: Hugging Face folder or id, folder with one GGUF, or .gguf file.
        output_dir: Folder of the result; an earlier result there is replaced when the new one is complete.
        options: What to do.
        resume: Go on at the last finished block of an interrupted run with the same model and options.
        progress: Told of every step.
        begin: Called with the model's configuration and what will be done, before anything is computed; what it raises
            ends the run.

    Raises:
        ValueError: Options that do not fit the model, weights with NaN, empty calibration text, a state to resume that
            belongs to other options.
        DeviceError: The device or the cluster is not there, or the memory does not suffice.
        FileExistsError: ``output_dir`` holds something else, or another run writes there.
        OSError: Writing failed; an earlier result is untouched.
    """
    start = time.monotonic()
    with limited(options.memory_limit), locked(Path(output_dir)) as output, connected(options) as cluster:
        check_replaceable(output, MANIFEST)
        placement = replace(options.placement(), folder=output.parent)
        model, tokenizer = _load_original(source)
        run = _Run.prepare(model, options, placement, progress)
        run.cluster = cluster and cluster.reading(source, options)
        if begin is not None:
            begin(model.config, run.plan())
        digest = model_hash(source)
        state = PartialState(output, fingerprint(options, digest), resume=resume)
        run.reporter.tell("calibration text", -1)
        data = _calibration(state, run, tokenizer)
        resumed = state.finished()
        run.blocks_in_order(data.tokens, state)
        run.reporter.tell("activations", len(run.blocks.modules) - 1, 1.0)
        acting = chosen_settings(model, data.tokens, run.layers, options, placement.device)
        report = run.report(output, data, resumed, start)
        found = resolve(source)
        known = {"hub_id": found.location} if found.kind is Kind.HUB else hub_origin(found.location)
        manifest = _manifest(report, options, {"name": known.get("hub_id", str(source)), "sha256": digest, **known})
        parts = checkpoint_parts(model, tokenizer, run.specs(), manifest, source_folder(source))
        write_checkpoint(output, replace(parts, settings=acting))
        state.remove()
        run.reporter.tell("done", len(run.blocks.modules))
        return report


def plan(source: str | Path, options: QuantizeOptions) -> tuple[Any, Plan]:
    """Return the configuration of a model and what `quantize_model` would do to it.

    What layers get follows from a small piece of each, how long it takes from trying one block.

    Raises:
        ValueError: Options that do not fit the model.
    """
    model, _ = _load_original(source)
    run = _Run.prepare(model, options, Placement(), None)
    specs = planned_specs(model, run.selection.names(run.blocks), options)
    held = memory(model, run.blocks.modules, run.adapter.hidden_size, options)
    spent = seconds(run.adapter, run.selection.layers, options, options.placement())
    return model.config, replace(run.plan(), specs=specs, memory=held, seconds=spent)


@dataclass
class _Run:
    """The state of one run over a loaded model."""

    adapter: ModelAdapter
    options: QuantizeOptions
    blocks: Blocks
    embeddings: Embeddings
    selection: Selection
    placement: Placement
    reporter: Reporter
    layers: dict[str, LayerReport] = field(default_factory=dict)
    embedding_layers: dict[str, LayerReport] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=list)
    few_tokens: list[str] = field(default_factory=list)
    coarse: list[str] = field(default_factory=list)
    cluster: Cluster | None = None

    @property
    def model(self) -> Any:
        """The model, changed in place."""
        return self.adapter.model

    @classmethod
    def prepare(
        cls, model: Any, options: QuantizeOptions, placement: Placement, progress: Callable[[Progress], None] | None
    ) -> _Run:
        """Find what is to be done and check that it can be."""
        note_unused(options)
        adapter = adapter_of(model)
        blocks, found = adapter.blocks(), adapter.embeddings()
        embeddings.check_embeddings(adapter, found, options)
        if options.kv_bits:
            adapter.cached_outputs()  # to see whether they are known
        _check_finite_outside(model, blocks)
        forms = make_plain(model)
        chosen = select(model, blocks, options)
        restore(model, forms, chosen.names(blocks))
        return cls(adapter, options, blocks, found, chosen, placement, Reporter(len(blocks.modules), progress))

    def plan(self) -> Plan:
        """Say what will be done."""
        chosen = self.selection
        return Plan(len(chosen.names(self.blocks)), chosen.share(self.blocks), chosen.left_alone)

    def needs_text(self) -> bool:
        """Return whether anything that is to be done depends on calibration text."""
        return self.options.needs_text() or embeddings.wants_statistics(self.embeddings, self.options)

    def blocks_in_order(self, tokens: Tensor, state: PartialState) -> None:
        """Quantize the embeddings and every block, or take finished blocks from ``state``."""
        finished = state.finished()
        choices = self._allocate(tokens, state) if finished < len(self.blocks.modules) else {}
        solver = BlockSolver(self.options, self.model.dtype, self.reporter, self.placement, choices, self.cluster)
        streaming, parallel = self.options.weighs_inputs(), solver.in_parallel()
        if streaming:
            self.reporter.tell("first inputs", -1)
        calls = capture.record_calls(self.model, self.blocks, tokens, self.placement.device) if streaming else []
        # Before the embedding may change.
        original = self._first_inputs(tokens, solver, calls) if solver.follows_original() else None
        last = self._last_inputs(tokens, solver)
        packed = embeddings.quantize_embedding(self.adapter, self.embeddings, self.options, last)
        streams = Streams.none()
        if streaming:
            same = None if packed and not parallel else original
            inputs = self._first_inputs(tokens, solver, calls) if same is None else same.copied()
            # Where every block is finished (the disk was full at the very end), there is nothing to stream for.
            streams = Streams(calls, inputs, original, len(calls) if finished < len(calls) else 0)
        self.reporter.start(finished)
        if parallel:
            streams, original = replace(streams, targets=None), None
            solve_side_by_side(self._sites(), streams, solver, state)
            self._blocks(Streams.none(), solver, state, len(self.blocks.modules))
        else:
            self._blocks(streams, solver, state, finished)
        packed |= embeddings.quantize_head(self.adapter, self.embeddings, self.options, last)
        self.embedding_layers = {name: LayerReport(spec) for name, spec in packed.items()}

    def _sites(self) -> list[Site]:
        each = zip(self.blocks.modules, self.selection.layers, strict=True)
        return [Site(index, f"{self.blocks.name}.{index}.", *found) for index, found in enumerate(each)]

    def _blocks(self, streams: Streams, solver: BlockSolver, state: PartialState, finished: int) -> None:
        """Go from block to block; the first ones are ``finished``."""
        for site in self._sites():
            if not solver.in_parallel():
                self.reporter.tell("solving" if site.index >= finished else "replaying", site.index)
            held = [stream.values for stream in (streams.inputs, streams.targets) if stream is not None]
            with self.placement.enough_memory(site.prefix[:-1], site.block, held):
                self._block(site, streams, solver, state, solve=site.index >= finished)
            relieve()

    def _allocate(self, tokens: Tensor, state: PartialState) -> dict[str, Choice]:
        """Return the choice for layers where a budget was given; elsewhere the options hold."""
        if self.options.target_bits is None:
            return {}
        if (known := state.choices()) is not None:
            return known
        self.reporter.tell("spending the budget", -1)
        with within_range(self.model):
            chosen = allocate(self.model, self.selection.names(self.blocks), tokens, self.options)
        state.save_choices(chosen)
        return chosen

    def _first_inputs(self, tokens: Tensor, solver: BlockSolver, calls: Sequence[BlockCall]) -> Stream:
        placement = self.placement.shared(solver.streams())
        dtype = next(self.blocks.modules[0].parameters()).dtype
        return capture.first_inputs(self.model, self.blocks, tokens, dtype, placement, calls)

    def _last_inputs(self, tokens: Tensor, solver: BlockSolver) -> LayerStatistics | None:
        """Return the statistics of what enters the output layer of the original model, where it can use them."""
        if self.embeddings.head is None or not embeddings.wants_statistics(self.embeddings, self.options):
            return None
        self.reporter.tell("inputs of the output layer", -1)
        some = tokens[: max(1, _HEAD_TOKENS // tokens.shape[1])]
        with solver.arithmetic():
            return capture.entering(self.model, self.blocks, self.embeddings.head[1], some, self.placement.device)

    def _block(self, site: Site, streams: Streams, solver: BlockSolver, state: PartialState, *, solve: bool) -> None:
        """Quantize one block, or replay it, and move both streams past it."""
        check_parameters(site.block, site.prefix)
        what, device = f"block {site.prefix[:-1]}", self.placement.device
        with in_float32(site.block, device):
            if streams.targets is not None and site.index < streams.end:
                with solver.arithmetic():
                    call = streams.calls[site.index]
                    capture.advance(site.block, call, streams.targets, f"{what} of the original model")
            if solve:
                state.save(site.index, solver.solve(site, streams))
            result = state.load(site.index)  # also when just solved: what is on disk is what the next block sees
            for name, module in result.layers.items():
                module.compute_dtype = self.model.dtype
                replace_module(self.model, name, module)
            for name, tensor in result.tensors.items():
                self.model.get_parameter(name).data = tensor.to(device, torch.float32)
            if site.index + 1 < streams.end:
                for name, module in result.layers.items():
                    twin = module.on(device)
                    twin.materialize()
                    replace_module(self.model, name, twin)
                with solver.rounded_inputs(site, streams), solver.arithmetic():
                    capture.advance(site.block, streams.calls[site.index], streams.inputs, what)
                for name, module in result.layers.items():  # the file's own tensors, on the host
                    module.dematerialize()
                    replace_module(self.model, name, module)
        self.scaled += result.scaled
        self.few_tokens += result.few_tokens
        self.coarse += [name for name, module in result.layers.items() if is_coarse(module)]
        for name, module in result.layers.items():
            self.layers[name] = LayerReport(module.spec, result.errors[name], result.without_branch.get(name))

    def specs(self) -> dict[str, LayerSpec]:
        """Return the specs of every packed layer by name."""
        return {name: layer.spec for name, layer in {**self.embedding_layers, **self.layers}.items()}

    def report(self, output: Path, data: CalibrationData, resumed: int, start: float) -> QuantizeReport:
        """Sum up."""
        layers = {**self.embedding_layers, **self.layers}
        entries = outside(self.embeddings, layers)
        entries["blocks"] = in_float(self.blocks.modules, self.layers.values())
        entries["model"] = in_float([self.model], layers.values())
        report = QuantizeReport(
            output_dir=output,
            layers=layers,
            totals=totals(self.layers, entries),
            left_alone=self.selection.left_alone,
            scaled=tuple(self.scaled),
            few_tokens=tuple(self.few_tokens),
            calibration=data.description,
            calibration_windows=self._calibration_windows(data.tokens),
            seconds=time.monotonic() - start,
            resumed_at=resumed,
            peak_rss_bytes=peak_rss_bytes(),
            devices=tuple(map(str, self.placement.devices)),
            rules=self.selection.rules,
            cluster=self.cluster.about() if self.cluster else {},
        )
        if report.unknown:
            note(report.unknown)
        if self.coarse:
            some = f"{len(self.coarse)} layers such as {self.coarse[0]}"
            note(f"8-bit parameters are coarse for rows of {some}, since scales beside theirs are larger; {_FINER}")
        return report

    def _calibration_windows(self, tokens: Tensor) -> dict[str, int]:
        """Return what was calibrated on beside what was asked for."""
        asked = {"windows_asked": self.options.calib_sequences, "tokens_asked": self.options.calib_length}
        return {"windows": tokens.shape[0], "tokens": tokens.shape[1], **asked}


def _check_finite_outside(model: nn.Module, blocks: Blocks) -> None:
    for name, module in model.named_modules():
        if not name.startswith(f"{blocks.name}."):
            check_parameters(module, f"{name}." if name else "", recurse=False)


def _load_original(source: str | Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(source)
    if packed_modules(model):
        raise ValueError(f"{source} is quantized already; give the original model")
    return model, tokenizer


def _calibration(state: PartialState, run: _Run, tokenizer: Any) -> CalibrationData:
    """Return the calibration tokens, those of the interrupted run if there was one; none where nothing needs text."""
    model, options = run.model, run.options
    if not run.needs_text():
        if options.calib is not None:
            note(f"the calibration text {options.calib} is not read: nothing that was chosen depends on it")
        return CalibrationData(torch.empty(0, 0, dtype=torch.int64), f"none: {options.method} needs no text here")
    if (stored := state.tokens()) is not None:
        return CalibrationData(*stored)
    most = adapter_of(model).longest_text() or options.calib_length
    if (length := min(options.calib_length, most)) < options.calib_length:
        note(f"the model's context is {most} tokens: calibration windows have as many, not {options.calib_length}")
    with within_range(model):
        data = calibration_batches(
            tokenizer,
            options.calib,
            sequences=options.calib_sequences,
            length=length,
            seed=options.seed,
            model=model,
            chat=options.calib_chat,
        )
    state.save_tokens(data.tokens, data.description)
    return data


def _manifest(report: QuantizeReport, options: QuantizeOptions, source: Mapping[str, str]) -> dict[str, Any]:
    return {
        "source": dict(source),
        "options": asdict(options),
        "calibration": report.calibration,
        "calibration_windows": dict(report.calibration_windows),
        "totals": dict(report.totals),
        "layers": {name: layer.to_json() for name, layer in report.layers.items()},
        "left_alone": dict(report.left_alone),
        "rules": dict(report.rules),
        "scaled_inputs": list(report.scaled),
        "few_tokens": list(report.few_tokens),
        "run": {
            "seconds": report.seconds,
            "resumed_at": report.resumed_at,
            "peak_rss_bytes": report.peak_rss_bytes,
            "threads": torch.get_num_threads(),
            "devices": list(report.devices),
            "cluster": dict(report.cluster),
        },
    }
