"""``rankbook eval``: perplexity, and divergence from a reference, of a model on any runtime."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from rankbook.calibration.device import DeviceOptions
from rankbook.calibration.model.hub import HubOptions, at_revision
from rankbook.calibration.option import argument, option, required
from rankbook.calibration.settings import ACTIVATION_FORMATS, KV_BITS
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.evaluate.options import EvalOptions
from rankbook.tools.kernel_options import KernelOptions
from rankbook.tools.report import Table


@dataclass(frozen=True, kw_only=True)
class Eval(EvalOptions, KernelOptions, DeviceOptions, HubOptions, Common):
    """Options of the verb."""

    model: str = argument(
        "Hugging Face model, GGUF, checkpoint; exported folder, .onnx or engine folder (exported with --logits all)",
        metavar="MODEL_OR_FILE",
    )
    text: str = required(".txt, .jsonl, .json or a datasets name to evaluate on", metavar="FILE")
    reference: str | None = option(None, "unquantized model for KL divergence and top-1 agreement", metavar="MODEL")
    activations: str | None = option(
        None,
        "quantize the inputs of linear layers so, whatever the checkpoint says (PyTorch models only)",
        choices=tuple(kind for kind in ACTIVATION_FORMATS if not kind.startswith("static")),
    )
    kv_bits: int | None = option(
        None,
        "quantize keys and values per token and head so, whatever the checkpoint says (PyTorch models only)",
        choices=KV_BITS,
    )
    tokenizer: str | None = option(None, "take the tokenizer from this model", metavar="MODEL")


def run(options: Eval) -> Outcome:
    """Evaluate."""
    from rankbook.calibration.text import read_text
    from rankbook.tools.evaluate.quality import evaluate
    from rankbook.tools.runtimes import Setting, find, open_model

    # A wrong path should not cost the time of loading a model.
    text = read_text(options.text, chat=options.chat)
    console = Console(quiet=options.quiet)
    with console.progress(f"evaluating {options.model}") as show:
        show(0.0, "loading")
        setting = Setting(options.threads, device=options.device)
        own = setting
        source = at_revision(options.model, options.revision)
        if options.reference is not None and not find(source, options.chosen_kernels())[0].devices:
            own = Setting(options.threads)  # the device is that of the reference
        model = open_model(source, options.chosen_kernels(), own, tokenizer=options.tokenizer)
        if options.activations is not None or options.kv_bits is not None:
            model.override(options.activations, options.kv_bits)
        reference = None
        if options.reference is not None:
            reference = open_model(options.reference, setting=setting)
        result = evaluate(model, text, options, reference=reference, progress=lambda fraction: show(fraction, None))
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
    return Outcome({"model": options.model, **asdict(result)}, [table])


COMMAND = Command(
    name="eval",
    summary="measure perplexity, KL divergence and top-1 agreement of a model on any runtime",
    example="rankbook eval q --text eval.txt --context 512 --max-tokens 20480 --reference MODEL --json",
    options=Eval,
    run=run,
)
