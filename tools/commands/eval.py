"""``rankbook eval``: perplexity, and divergence from a reference, of a model on any runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.output import RESULTS
from rankbook.calibration.device import AUTO, DeviceOptions
from rankbook.calibration.memory import MemoryOptions, limited
from rankbook.calibration.model.hub import HubOptions, at_revision
from rankbook.calibration.option import argument, described, option
from rankbook.calibration.settings import ACTIVATION_FORMATS, KV_BITS
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.kept import folder_of, keep
from rankbook.tools.evaluate.options import EvalOptions, HarnessOptions
from rankbook.tools.kernel_options import KernelOptions
from rankbook.tools.report import Table

if TYPE_CHECKING:
    from rankbook.tools.runtimes import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Eval(EvalOptions, HarnessOptions, KernelOptions, DeviceOptions, MemoryOptions, HubOptions, Common):
    """Options of the verb."""

    model: str = argument(
        "Hugging Face model, GGUF, checkpoint; exported folder, .onnx or engine folder (exported with --logits all)",
        metavar="MODEL_OR_FILE",
    )
    text: str | None = option(
        None, ".txt, .jsonl, .json or a datasets name to evaluate on; or give --tasks", metavar="FILE"
    )
    reference: str | None = option(None, "unquantized model for KL divergence and top-1 agreement", metavar="MODEL")
    activations: str | None = option(
        None,
        "how to round the inputs of linear layers, instead of as the checkpoint says (PyTorch models only)",
        choices=tuple(kind for kind in ACTIVATION_FORMATS if not kind.startswith("static")),
    )
    kv_bits: int | None = option(
        None,
        "bits of keys and values, per token and head, instead of as the checkpoint says (PyTorch models only)",
        choices=KV_BITS,
    )
    tokenizer: str | None = option(None, "take the tokenizer from this model", metavar="MODEL")
    card: bool = option(
        False,
        "keep the result in the model's folder too: in the table of results of its model card (README.md), and in"
        " rankbook-evaluation.json; in place of an earlier one that was measured in the same way",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None and not self.tasks:
            raise UsageError("--text is missing; give it, or --tasks of lm-evaluation-harness")
        if self.tasks and (self.text or self.reference):
            raise UsageError("--tasks bring their own texts; leave --text and --reference out")
        for item in described(EvalOptions) if self.tasks else ():
            if getattr(self, item.name) != item.default:
                raise UsageError(f"--{item.name.replace('_', '-')} belongs to --text; leave it out of --tasks")
        if not self.tasks and (self.task_folder or self.limit or self.fewshot is not None):
            raise UsageError("--task-folder, --limit and --fewshot belong to --tasks; leave them out")


def run(options: Eval) -> Outcome:
    """Evaluate."""
    from rankbook.calibration.checkpoint.card import CARD
    from rankbook.tools.runtimes import find

    if options.memory_limit and not find(options.model, options.chosen_kernels())[0].devices:
        raise UsageError("--memory-limit is for models that PyTorch runs; ONNX Runtime maps its files by itself")
    folder = folder_of(options.model) if options.card else None
    with limited(options.memory_limit):
        outcome = _tasks(options) if options.tasks else _text(options)
    if folder is None:
        return outcome
    keep(folder, outcome.report)
    return replace(outcome, text=f"kept in {folder / CARD} and {folder / RESULTS}")


def _tasks(options: Eval) -> Outcome:
    """Run tasks of lm-evaluation-harness."""
    from rankbook.tools.evaluate.harness import evaluate_tasks

    console = Console(quiet=options.quiet)
    with console.progress(f"evaluating {options.model}") as show:
        show(0.0, "loading")
        model = _open(options, options.device)
        show(0.1, "tasks")
        found = evaluate_tasks(model, options)
    rows = [
        (task, metric.removesuffix(",none"), value)
        for task, metrics in found.items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float))
    ]
    asked: dict[str, Any] = {"tasks": options.tasks, "limit": options.limit, "fewshot": options.fewshot}
    asked["task-folder"] = options.task_folder
    given = {"model": options.model, "kernels": model.kernels, "flags": _flags(options)}
    report = {**given, "asked": {name: value for name, value in asked.items() if value is not None}, "tasks": found}
    return Outcome(report, [Table(options.model, ("task", "metric", "value"), rows)])


def _open(options: Eval, device: str) -> LanguageModel:
    """Open the model with the settings that were asked for."""
    from rankbook.tools.runtimes import Setting, open_model

    source, setting = at_revision(options.model, options.revision), Setting(options.threads, device=device)
    model = open_model(source, options.chosen_kernels(), setting, tokenizer=options.tokenizer)
    if options.activations is not None or options.kv_bits is not None:
        model.override(options.activations, options.kv_bits)
    return model


def _text(options: Eval) -> Outcome:
    """Measure on a text."""
    from rankbook.calibration.text import read_text
    from rankbook.tools.evaluate.quality import evaluate
    from rankbook.tools.runtimes import Setting, find, open_model

    # A wrong path should not cost the time of loading a model.
    text = read_text(str(options.text), chat=options.chat)
    console = Console(quiet=options.quiet)
    with console.progress(f"evaluating {options.model}") as show:
        show(0.0, "loading")
        reference, device = options.reference, options.device
        if reference is not None and not find(options.model, options.chosen_kernels())[0].devices:
            device = AUTO  # the device is that of the reference
        model, compared = _open(options, device), None
        if reference is not None:
            compared = open_model(reference, setting=Setting(options.threads, device=options.device))
        result = evaluate(model, text, options, reference=compared, progress=lambda fraction: show(fraction, None))
    rows = [
        ("perplexity", result.perplexity),
        ("perplexity of the reference", result.reference_perplexity),
        ("KL divergence from the reference, nats", result.kl),
        ("same most likely token as the reference", result.top1_agreement),
        ("tokens", result.tokens),
        ("special tokens before each window", " ".join(result.windows["prefix"]["tokens"]) or "none, as in a prompt"),
        ("seconds", result.seconds),
    ]
    table = Table(options.model, ("measure", "value"), [row for row in rows if row[1] is not None])
    given = {"model": options.model, "text": options.text, "reference": options.reference, "kernels": model.kernels}
    return Outcome({**given, "flags": _flags(options), **asdict(result)}, [table])


def _flags(options: Eval) -> dict[str, Any]:
    """Return what was chosen that changes the result, by the name of its flag; reports name it, and repeat it."""
    names = ("activations", "kv_bits", "chat", "tokenizer", "revision", "device")
    chosen = {"kernels": options.chosen_kernels(), **{name: getattr(options, name) for name in names}}
    return {name.replace("_", "-"): value for name, value in chosen.items() if value not in (None, False, AUTO)}


COMMAND = Command(
    name="eval",
    summary="measure perplexity, KL divergence and top-1 agreement of a model on any runtime",
    example="rankbook eval q --text eval.txt --context 512 --max-tokens 20480 --reference MODEL --json",
    options=Eval,
    run=run,
)
