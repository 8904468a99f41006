"""``rankbook eval``: perplexity, and divergence from a reference, of a model on any runtime."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rankbook.calibration.settings import ACTIVATIONS, KV_BITS
from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.kernel_flags import add_kernel_flags, chosen_kernels
from rankbook.tools.report import Table

if TYPE_CHECKING:
    from torch import Tensor

    from rankbook.tools.runtimes.base import LanguageModel


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add(
        "model",
        metavar="MODEL_OR_FILE",
        required=True,
        text="Hugging Face model, GGUF, checkpoint, exported folder or .onnx (exported with --logits all)",
    )
    flags.add("--text", metavar="FILE", required=True, text=".txt, .jsonl or a datasets name to evaluate on")
    flags.add("--context", type=int, default=512, metavar="N", text="tokens per window; windows do not overlap")
    flags.add(
        "--max-tokens", type=int, metavar="N", text="tokens to evaluate on, rounded up to windows; all without it"
    )
    flags.add("--reference", metavar="MODEL", text="unquantized model for KL divergence and top-1 agreement")
    flags.add("--batch", type=int, default=1, metavar="N", text="windows per call")
    add_kernel_flags(flags)
    dynamic = [kind for kind in ACTIVATIONS if not kind.startswith("static")]
    flags.add(
        "--activations",
        choices=dynamic,
        text="quantize the inputs of linear layers so, whatever the checkpoint says (PyTorch models only)",
    )
    flags.add(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        text="quantize keys and values per token and head so, whatever the checkpoint says (PyTorch models only)",
    )
    flags.add("--tokenizer", metavar="MODEL", text="take the tokenizer from this model")


def run(options: argparse.Namespace) -> Outcome:
    """Evaluate."""
    from rankbook.calibration.data import read_text
    from rankbook.calibration.evaluate import evaluate
    from rankbook.tools.models import open_model

    for name, least in (("context", 2), ("batch", 1), ("max_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
    # A wrong path should not cost the time of loading a model.
    text = read_text(options.text)
    console = Console(quiet=options.quiet)
    with console.progress(f"evaluating {options.model}") as show:
        show(0.0, "loading")
        kernels = chosen_kernels(options)
        model = open_model(options.model, threads=options.threads, tokenizer=options.tokenizer, kernels=kernels)
        _override(options, model)
        reference = None
        if options.reference is not None:
            reference = open_model(options.reference, threads=options.threads)
            model.tokenizer = model.tokenizer or reference.tokenizer
        windows = _windows(options, model, text)
        result = evaluate(
            _logits(model),
            windows,
            None if reference is None else _logits(reference),
            batch=options.batch,
            progress=lambda fraction: show(fraction, None),
        )
    rows = [
        ("perplexity", result.perplexity),
        ("perplexity of the reference", result.reference_perplexity),
        ("KL divergence from the reference, nats", result.kl),
        ("same most likely token as the reference", result.top1_agreement),
        ("tokens", result.tokens),
        ("seconds", result.seconds),
    ]
    table = Table(options.model, ("measure", "value"), [row for row in rows if row[1] is not None])
    return Outcome({"model": options.model, **asdict(result)}, [table])


def _override(options: argparse.Namespace, model: LanguageModel) -> None:
    """Replace the settings of activations and cache that the flags name."""
    if options.activations is None and options.kv_bits is None:
        return
    from rankbook.calibration.activations.runtime import override
    from rankbook.tools.runtimes.torch import TorchModel

    if not isinstance(model, TorchModel):
        raise UsageError(
            f"--activations and --kv-bits apply to PyTorch models; {options.model} is an exported file, which has its"
            " own: evaluate the checkpoint that it was made from"
        )
    override(model.model, kind=options.activations, kv_bits=options.kv_bits)


def _windows(options: argparse.Namespace, model: LanguageModel, text: str) -> Tensor:
    from rankbook.calibration.data import token_windows

    if model.tokenizer is None:
        raise UsageError(f"{options.model} has no tokenizer; name a model that has it: --tokenizer MODEL")
    windows = token_windows(model.tokenizer, text, options.context, what=str(options.text))
    if options.max_tokens is not None:
        windows = windows[: max(1, -(-options.max_tokens // options.context))]
    return windows


def _logits(model: LanguageModel) -> Any:
    return lambda tokens: model.logits(tokens.numpy())


COMMAND = Command(
    name="eval",
    summary="measure perplexity, KL divergence and top-1 agreement of a model on any runtime",
    example="rankbook eval q --text eval.txt --context 512 --max-tokens 20480 --reference MODEL --json",
    add_flags=add_flags,
    run=run,
)
