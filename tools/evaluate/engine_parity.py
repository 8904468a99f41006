"""Checks that an engine computes what the file computes that it was built from, and where it begins not to.

Polygraphy compares PyTorch, ONNX Runtime and the engine on the same tokens, and decoding token by token. Where the
logits are out of tolerance, a second engine is built of which the output of every packed layer is an output too.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.tools.deploy.options import BuildOptions
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.greedy import GreedyCheck, compare_greedy
from rankbook.tools.evaluate.node_checks import LayerCheck
from rankbook.tools.evaluate.node_model import graph_with_outputs
from rankbook.tools.evaluate.options import ParityOptions
from rankbook.tools.evaluate.parity import CACHED_TOKENS, compared_tokens, noted_checkpoint
from rankbook.tools.evaluate.runners import Agreement, Array, function_runner, judge, run
from rankbook.tools.evaluate.tolerance import default_tolerance, match_settings

if TYPE_CHECKING:
    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.deploy.manifest import Manifest
    from rankbook.tools.runtimes.base import LanguageModel, Tokens
    from rankbook.tools.runtimes.exported import FileModel
    from rankbook.tools.runtimes.torch import TorchModel
    from rankbook.tools.runtimes.trt_model import EngineModel


@dataclass(frozen=True)
class Given:
    """What is to be compared, by place and name.

    Attributes:
        engine: The engine folder.
        model: The exported folder or ``.onnx`` file that it was built from; None where the manifest says it.
        checkpoint: What that was made from; None where `rankbook export` noted it.
        kernels: What computes packed layers in ONNX Runtime.
        text: Text to take the tokens from; random tokens without.
    """

    engine: Path
    model: Path | None = None
    checkpoint: Path | None = None
    kernels: str = "bodies"
    text: Path | None = None


@dataclass(frozen=True)
class Contestants:
    """What is compared.

    Attributes:
        engine: The engine.
        file: What it was built from, in ONNX Runtime or in numpy; None where ONNX Runtime does not run it (bf16).
        torch: The checkpoint that the file was exported from, or None where it is gone.
        exported: The file itself.
        open: Opens another engine folder as ``engine`` was opened.
    """

    engine: EngineModel
    file: FileModel | None
    torch: TorchModel | None
    exported: ExportedModel
    open: Callable[[Path], EngineModel]

    @property
    def references(self) -> list[FileModel | TorchModel]:
        """What the engine is compared with, ONNX Runtime first.

        Raises:
            UsageError: Nothing.
        """
        found = [model for model in (self.file, self.torch) if model is not None]
        if not found:
            raise UsageError(
                f"{self.exported.path} is {self.exported.metadata.dtype}, which ONNX Runtime does not run on a CPU, and"
                " its checkpoint is not where it was; name it with --checkpoint DIR, or give --kernels reference"
            )
        return found


@dataclass(frozen=True)
class ReferenceCheck:
    """The engine beside one reference.

    Attributes:
        reference: What computed it.
        logits: Of all tokens from an empty cache.
        cached: Of decoding token by token.
        top1_agreement: Share of positions where both pick the same token.
    """

    reference: str
    logits: Agreement
    cached: Agreement
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """Whether both are within tolerance."""
        return self.logits.passed and self.cached.passed


@dataclass(frozen=True)
class EngineParityReport:
    """The verdict and what it rests on.

    Attributes:
        engine: The engine folder.
        model: The file that it was built from.
        runtime: What ran the engine, with the version that built it.
        tolerance: Largest relative difference that passes.
        tokens: Shape of the tokens compared, (batch, length).
        references: ONNX Runtime on the file, and PyTorch on its checkpoint.
        missing: References that took no part, with the reason.
        greedy: Prompts continued by the first reference and the engine, if asked for.
        layers: Outputs of packed layers of ONNX Runtime and a second engine, in graph order; empty if not looked for.
        first_bad_layer: Name of the first of them out of tolerance, or None.
        results: File with all outputs that were compared, in polygraphy's format, or None.
        passed: Whether everything passed.
    """

    engine: str
    model: str
    runtime: str
    tolerance: float
    tokens: tuple[int, int]
    references: tuple[ReferenceCheck, ...]
    missing: tuple[str, ...] = ()
    greedy: tuple[GreedyCheck, ...] = ()
    layers: tuple[LayerCheck, ...] = ()
    first_bad_layer: str | None = None
    results: str | None = None
    passed: bool = field(default=False)


def engine_parity(
    given: Given,
    options: ParityOptions,
    results: Path | None = None,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> EngineParityReport:
    """Check that an engine computes what its file computes, see `check`.

    Raises:
        UsageError: Too few tokens, the file is gone or another one, or the engine cannot be loaded.
        MissingError: A runtime cannot be used on this machine.
    """
    if options.tokens <= CACHED_TOKENS:
        raise UsageError(f"--tokens {options.tokens} is too few; give at least {CACHED_TOKENS + 1}")
    progress(0.0, "loading")
    opened = _opened(given, options)
    opened.engine.check_room(options.tokens, "--tokens")
    words = int(opened.exported.outputs["logits"][-1])
    tokens = compared_tokens(opened.references[-1], words, given.text, options)
    return check(opened, tokens, options, results, progress)


def _opened(given: Given, options: ParityOptions) -> Contestants:
    """Find and load everything that takes part."""
    from rankbook.calibration.checkpoint.format import open_checkpoint
    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.deploy.manifest import Manifest
    from rankbook.tools.runtimes import Setting, find
    from rankbook.tools.runtimes.torch import TorchModel
    from rankbook.tools.runtimes.trt_model import EngineModel

    runtime, source = find(given.engine)

    def open_engine(folder: Path) -> EngineModel:
        opened = runtime.open(replace(source, location=str(folder)), Setting()) if runtime.open else None
        if not isinstance(opened, EngineModel):
            raise UsageError(f"{runtime.name} runs {folder}, but not as an engine that can be compared")
        return opened

    manifest = Manifest.read(Path(source.location))
    file = ExportedModel.open(given.model or manifest.exported())
    manifest.check(file.path)
    file.verify()
    engine = open_engine(manifest.folder)
    model, kernels = None, find(file.path, given.kernels)[0]
    if kernels.open_file is None:
        raise UsageError(f"{kernels.name} opens no exported files; choose other --kernels")
    if file.metadata.dtype != "bf16" or kernels.name == "reference":
        model = kernels.open_file(file, Setting(options.threads))
    checkpoint, original = given.checkpoint or noted_checkpoint(file.path), None
    if checkpoint is not None:
        open_checkpoint(checkpoint, verify=True)
        original = TorchModel(checkpoint, threads=options.threads, device=options.device)
    return Contestants(engine, model, original, file, open_engine)


def check(
    given: Contestants,
    tokens: Tokens,
    options: ParityOptions,
    results: Path | None,
    note: Callable[[float, str], None],
) -> EngineParityReport:
    """Run every comparison.

    Args:
        given: The engine and what it is compared with.
        tokens: (batch, length) int64, at least `CACHED_TOKENS` + 1 long.
        options: What to check.
        results: Where polygraphy's results go, or None.
        note: Called with the fraction done and the name of the step.

    Raises:
        UsageError: The engine holds fewer tokens than are compared, or there is nothing to compare it with.
    """
    tolerance = default_tolerance(given.exported) if options.tolerance is None else options.tolerance
    note(0.0, "logits")
    held = _run(given, tokens)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        held.save(str(results))
    references = tuple(_judged(held, place + 1, tolerance) for place in range(len(given.references)))
    greedy: tuple[GreedyCheck, ...] = ()
    if options.greedy:
        first = given.references[0]
        greedy = compare_greedy(
            first, given.engine, options.greedy, tolerance, lambda share: note(0.3 + 0.4 * share, "greedy")
        )
    layers: tuple[LayerCheck, ...] = ()
    if given.file is not None and not options.no_layers and not all(item.logits.passed for item in references):
        note(0.7, "a second engine, layer by layer")
        layers = bisect(given, given.file, tokens[:1], tolerance)
    missing = []
    if given.file is None:
        missing.append(f"ONNX Runtime: no {given.exported.metadata.dtype} on a CPU (--kernels reference is numpy)")
    if given.torch is None:
        missing.append("PyTorch: the checkpoint is not where it was (--checkpoint DIR)")
    return EngineParityReport(
        engine=str(given.engine.manifest.folder),
        model=str(given.exported.path),
        runtime=f"{given.engine.kernels} {given.engine.manifest.facts['version']}",
        tolerance=tolerance,
        tokens=(int(tokens.shape[0]), int(tokens.shape[1])),
        references=references,
        missing=tuple(missing),
        greedy=greedy,
        layers=layers,
        first_bad_layer=next((layer.name for layer in layers if not layer.passed), None),
        results=None if results is None else str(results),
        passed=all([*(item.passed for item in references), *(item.passed for item in greedy)]),
    )


def _run(given: Contestants, tokens: Tokens) -> Any:
    """Return polygraphy's results of the engine and of what it is compared with."""
    if given.torch is not None:
        match_settings(given.exported, given.torch)
    positions = 1 if given.engine.last_only else tokens.shape[1]
    inputs = {"input_ids": tokens}

    def infer(held: LanguageModel) -> Callable[[Any], dict[str, Array]]:
        def compute(values: Any) -> dict[str, Array]:
            ids = np.asarray(values["input_ids"])
            # Row by row: an engine may hold one text only.
            rows = [held.scores(row[None])[:, -positions:] for row in ids]
            steps = [held.start(ids[:1, :-CACHED_TOKENS])]
            steps += [held.step(int(token)) for token in ids[0, -CACHED_TOKENS:]]
            return {"logits": np.concatenate(rows), "cached": np.stack(steps)}

        return compute

    models: list[LanguageModel] = [given.engine, *given.references]
    return run([function_runner(model.name, inputs, infer(model)) for model in models], inputs)


def _judged(results: Any, place: int, tolerance: float) -> ReferenceCheck:
    """Compare the engine, which comes first, with another one."""
    agreements = {item.name: item for item in judge(results, tolerance, (place, 0))}
    runs = list(results.items())
    actual, expected = (np.asarray(runs[index][1][0]["logits"]) for index in (0, place))
    same = float((expected.argmax(-1) == actual.argmax(-1)).mean())
    return ReferenceCheck(runs[place][0], agreements["logits"], agreements["cached"], same)


def bisect(given: Contestants, file: FileModel, tokens: Tokens, tolerance: float) -> tuple[LayerCheck, ...]:
    """Compare the output of every packed layer in ONNX Runtime with that of a second engine, on tokens (1, length)."""
    most = max(bounds["input_ids"][1][1] for bounds in given.engine.engine.profiles)
    tokens, outputs = tokens[:, :most], dict(file.file.outputs_of)  # one call of the engine
    values = list(outputs.values())
    with tempfile.TemporaryDirectory(prefix="rankbook-layers-") as temporary:
        folder = build_marked(given.engine.manifest, file.file, values, Path(temporary))
        found = given.open(folder).values(tokens, values)
    graph, actual = graph_with_outputs(file.file, values), {name: found[value] for name, value in outputs.items()}
    feeds = file.feeds(tokens)
    first = function_runner("layers of the file", feeds, lambda given: file.run_graph(graph, outputs, given))
    second = function_runner("layers of the engine", feeds, lambda _: actual)
    agreements = judge(run([first, second], feeds), tolerance)
    return tuple(LayerCheck(item.name, item.error, item.passed) for item in agreements)


def build_marked(manifest: Manifest, file: ExportedModel, values: list[str], folder: Path) -> Path:
    """Build an engine as another one was built, of which inner values are outputs too; return its folder.

    Args:
        manifest: Of the engine that it is like.
        file: What that was built from.
        values: Names of the values.
        folder: Gets the graph, its weights and the engine.
    """
    from rankbook.tools.deploy.engine import build

    graph = folder / "onnx" / file.path.name
    graph.parent.mkdir()
    graph.write_bytes(graph_with_outputs(file, values))
    for name, data in file.data_files.items():
        place = graph.parent / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:  # a file of the same bytes, since links out of an exported folder are refused
            place.hardlink_to(data.resolve())
        except OSError:
            shutil.copyfile(data, place)
    build(graph, folder / "engine", _options_of(manifest))
    return folder / "engine"


def _options_of(manifest: Manifest) -> BuildOptions:
    """Return options that build an engine like that of a manifest."""
    facts, shapes = manifest.facts, manifest.facts["profiles"]["prefill"]
    batch, sequence = shapes["input_ids"][2]
    more: dict[str, Any] = {"compute_capability": tuple(facts["capabilities"])} if facts["capabilities"] else {}
    if "attention_mask" in shapes:  # a cache that grows; one of a fixed length has its own
        more["max_context"] = shapes["attention_mask"][2][1]
    return BuildOptions(
        target=facts["target"],
        max_batch=batch,
        max_sequence=sequence,
        plugins="aot" if facts["plugin_form"].startswith("PTX") else "library",
        no_plugins=not facts["plugin_layers"],
        self_contained=facts["self_contained"],
        **more,
    )
