"""Checks that an exported file computes what its checkpoint computes: whole, node by node and layer by layer.

Four comparisons through polygraphy: the logits of PyTorch and of the file on the same tokens, the same with a cache
filled token by token, each kind of custom node against the numpy reference, and the output of every custom node
against the torch module of the same name, which shows where an error begins and how it grows. A fifth one, on request,
continues prompts greedily with both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rankbook.calibration.notes import note
from rankbook.exporter import cache_names
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.greedy import GreedyCheck, compare_greedy
from rankbook.tools.evaluate.node_checks import Depth, OperatorCheck, bisect, compare_operators
from rankbook.tools.evaluate.options import ParityOptions
from rankbook.tools.evaluate.runners import Agreement, Array, compare, function_runner
from rankbook.tools.evaluate.tolerance import default_tolerance, exact_tolerance, match_settings
from rankbook.tools.runtimes import Setting, find
from rankbook.tools.runtimes.exported import FileModel
from rankbook.tools.runtimes.torch import TorchModel

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import LanguageModel, Tokens

CACHED_TOKENS = 4
"""Tokens that the check of the cache feeds one by one."""


@dataclass(frozen=True, kw_only=True)
class ParityReport(Depth):
    """The verdict and what it rests on; where an error begins is in the fields of `Depth`.

    Attributes:
        model: The exported file.
        checkpoint: What it was compared with.
        kernels: What computed packed layers in the file.
        tolerance: Largest relative difference that passes.
        tokens: Shape of the tokens compared, (batch, length).
        problems: What the file's structure violates; empty if it is in order.
        logits: Whole-model agreement, or None if the file could not run.
        top1_agreement: Share of positions where both pick the same token.
        cached: Agreement of cached decoding, or None if the file has no cache.
        operators: Custom nodes against the numpy reference.
        greedy: Prompts continued by both, if asked for.
        passed: Whether everything passed.
    """

    model: str
    checkpoint: str
    tolerance: float
    tokens: tuple[int, int]
    problems: tuple[str, ...] = ()
    logits: Agreement | None = None
    top1_agreement: float | None = None
    cached: Agreement | None = None
    operators: tuple[OperatorCheck, ...] = ()
    greedy: tuple[GreedyCheck, ...] = ()
    kernels: str = ""
    passed: bool = False


def parity(
    model: str | Path,
    checkpoint: str | Path | None = None,
    options: ParityOptions | None = None,
    *,
    kernels: str = "bodies",
    text: str | Path | None = None,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> ParityReport:
    """Check that an exported file computes what its checkpoint computes.

    >>> report = rankbook.parity("onnx", "checkpoint", rankbook.ParityOptions(tokens=8))
    >>> report.passed, len(report.layers), report.top1_agreement
    (True, 14, 1.0)

    Args:
        model: Exported folder or ``.onnx`` file.
        checkpoint: What it was made from; None where `rankbook export` noted that.
        options: What to check.
        kernels: What computes packed layers: a runtime that rounds no activations, or ``auto``.
        text: Text to take the tokens from; random tokens without.
        progress: Called with the fraction done and the name of the step.

    Raises:
        UsageError: Too few tokens for a check, no exported file, or no checkpoint.
        MissingError: The runtime cannot be used on this machine.
        ValueError: File or checkpoint are damaged or changed.
    """
    from rankbook.calibration.checkpoint.format import open_checkpoint
    from rankbook.calibration.model.adapter import adapter_of
    from rankbook.exporter.file import ExportedModel

    options = options or ParityOptions()
    if options.tokens <= CACHED_TOKENS:
        raise UsageError(f"--tokens {options.tokens} is too few; give at least {CACHED_TOKENS + 1}")
    runtime, source = find(model, kernels)
    if runtime.open_file is None:
        raise UsageError(f"{runtime.name} opens no exported files, and {model} is {source.kind.value}")
    file = ExportedModel.open(source.path)
    file.require_packed()
    file.verify()
    folder = Path(checkpoint) if checkpoint is not None else noted_checkpoint(source.path)
    if folder is None:
        raise UsageError(f"the checkpoint of {model} is not where it was; name it with --checkpoint DIR")
    open_checkpoint(folder, verify=True)
    progress(0.0, "loading")
    exported = runtime.open_file(file, Setting(options.threads))
    exported.check_room(options.tokens, "--tokens")
    original = TorchModel(folder, threads=options.threads, device=options.device)
    tokens = compared_tokens(original, adapter_of(original.model).vocabulary, text, options)
    return check(exported, original, tokens, options, progress)


def noted_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint that an exported file was made from, as its export wrote it down, if it is still there."""
    resolved = path.with_name("rankbook-export.yaml")
    if not resolved.is_file():
        return None
    import yaml

    export = (yaml.safe_load(resolved.read_text(encoding="utf-8")) or {}).get("export", {})
    noted, folder = export.get("checkpoint", ""), path.absolute().parent
    # Both folders may have moved together, and each may have another name in the same place.
    way = os.path.relpath(noted, export["output"]) if Path(export.get("output", "")).is_absolute() else ""
    candidates = [Path(noted), *([folder / way] if way else []), folder.parent / Path(noted).name]
    return next((candidate.resolve() for candidate in candidates if noted and candidate.is_dir()), None)


def compared_tokens(model: LanguageModel, vocabulary: int, text: str | Path | None, options: ParityOptions) -> Tokens:
    """Return two sequences of tokens: of a text by the model's tokenizer, or random ones of the vocabulary.

    Raises:
        UsageError: There is a text and no tokenizer, or it is too short for the check of the cache.
    """
    if text is None:
        return np.random.default_rng(options.seed).integers(0, vocabulary, (2, options.tokens))
    if model.tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer for --text; leave it out")
    from rankbook.calibration.data import token_windows
    from rankbook.calibration.text import read_text

    tokens: Tokens = token_windows(model.tokenizer, read_text(text), options.tokens, most=2).tokens.numpy()
    if tokens.shape[1] <= CACHED_TOKENS:
        raise UsageError(f"{text} has {tokens.shape[1]} tokens; give a text of at least {CACHED_TOKENS + 1}")
    if tokens.shape != (2, options.tokens):
        note(f"{text} is short: compared on {tokens.shape[0]} x {tokens.shape[1]} tokens; give more text")
    return tokens


def check(
    model: FileModel,
    torch_model: TorchModel,
    tokens: Tokens,
    options: ParityOptions,
    progress: Callable[[float, str], None],
) -> ParityReport:
    """Run every comparison.

    Args:
        model: The exported file.
        torch_model: The checkpoint that it was made from.
        tokens: (batch, length) int64, at least `CACHED_TOKENS` + 1 long.
        options: What to check.
        progress: Called with the fraction done and the name of the step.
    """
    from rankbook.exporter import conform

    file = model.file
    tolerance = default_tolerance(file) if options.tolerance is None else options.tolerance
    match_settings(file, torch_model)
    progress(0.0, "structure")
    problems = tuple(conform.check(file))
    progress(0.1, "logits")
    logits, top1 = compare_logits(model, torch_model, tokens, tolerance)
    progress(0.3, "cached decoding")
    cached = compare_cached(model, torch_model, tokens[:1], tolerance)
    progress(0.5, "operators")
    exact = exact_tolerance(file) if options.tolerance is None else options.tolerance
    operators = compare_operators(model, exact, options)
    progress(0.7, "layers")
    depth = bisect(model, torch_model, tokens, tolerance) if not options.no_layers else Depth()
    greedy: tuple[GreedyCheck, ...] = ()
    if options.greedy:
        greedy = compare_greedy(
            torch_model, model, options.greedy, tolerance, lambda share: progress(0.8 + 0.2 * share, "greedy")
        )
    verdicts = [logits.passed, cached is None or cached.passed]
    verdicts += [item.passed for item in operators] + [item.passed for item in depth.layers]
    verdicts += [item.passed for item in greedy]
    return ParityReport(
        model=str(file.path),
        checkpoint=torch_model.name.removeprefix("torch "),
        tolerance=tolerance,
        tokens=(int(tokens.shape[0]), int(tokens.shape[1])),
        problems=problems,
        logits=logits,
        top1_agreement=top1,
        cached=cached,
        operators=operators,
        **vars(depth),
        greedy=greedy,
        kernels=model.kernels,
        passed=all(verdicts) and not problems,
    )


def compare_logits(
    model: FileModel, torch_model: TorchModel, tokens: Tokens, tolerance: float
) -> tuple[Agreement, float]:
    """Compare the logits of the whole model without a cache; also return how often the best token is the same."""
    positions = 1 if model.last_only else tokens.shape[1]
    seen: list[Array] = []

    def infer(held: LanguageModel) -> Callable[[Any], dict[str, Array]]:
        def run(values: Any) -> dict[str, Array]:
            seen.append(held.scores(np.asarray(values["input_ids"]))[:, -positions:])
            return {"logits": seen[-1]}

        return run

    inputs = {"input_ids": tokens}
    first, second = (function_runner(held.name, inputs, infer(held)) for held in (torch_model, model))
    (agreement,) = compare(first, second, inputs, tolerance)
    return agreement, float((seen[0].argmax(-1) == seen[1].argmax(-1)).mean())


def compare_cached(model: FileModel, torch_model: TorchModel, tokens: Tokens, tolerance: float) -> Agreement | None:
    """Compare decoding with a cache, token by token, with the logits that PyTorch computes without one."""
    if not any(cache_names.is_past(name) for name in model.file.inputs):
        return None
    prompt = tokens[:, :-CACHED_TOKENS]

    def infer_torch(values: Any) -> dict[str, Array]:
        return {"logits": torch_model.logits(np.asarray(values["input_ids"]))[0, -CACHED_TOKENS - 1 :]}

    def infer_file(values: Any) -> dict[str, Array]:
        rows = [model.start(prompt)]
        rows += [model.step(int(token)) for token in values["input_ids"][0, -CACHED_TOKENS:]]
        return {"logits": np.stack(rows)}

    inputs = {"input_ids": tokens}
    first = function_runner("torch without a cache", inputs, infer_torch)
    second = function_runner(f"{model.name} with a cache", inputs, infer_file)
    (agreement,) = compare(first, second, inputs, tolerance)
    return agreement
