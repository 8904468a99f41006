"""``rankbook generate``: stream text from a checkpoint, any Hugging Face model, or an exported file."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rankbook.calibration.device import DeviceOptions
from rankbook.calibration.memory import peak_rss_bytes
from rankbook.calibration.model.hub import HubOptions, at_revision
from rankbook.calibration.option import argument, option
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.generation.loop import GenerateOptions, generate
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.kernel_options import KernelOptions
from rankbook.tools.report import printable
from rankbook.tools.runtimes import Setting, open_model

_WHY = {
    "stop": "the end of the text",
    "length": "--max-new-tokens",
    "context": "the context of the model, which is full",
}


@dataclass(frozen=True, kw_only=True)
class Generate(GenerateOptions, KernelOptions, DeviceOptions, HubOptions, Common):
    """Options of the verb."""

    model: str = argument(
        "checkpoint, Hugging Face model, GGUF, exported folder, .onnx or engine folder", metavar="MODEL"
    )
    prompt: str | None = option(
        None, "prompt; read from stdin when not given", metavar="TEXT", flags=("-p", "--prompt")
    )
    tokenizer: str | None = option(None, "take the tokenizer from this model when MODEL has none", metavar="MODEL")


def run(options: Generate) -> Outcome:
    """Generate; the text goes to stdout as it comes, tokens per second to stderr."""
    console = Console(quiet=options.quiet)
    prompt = options.prompt if options.prompt is not None else sys.stdin.read()
    setting = Setting(options.threads, device=options.device)
    source = at_revision(options.model, options.revision)
    model = open_model(source, options.chosen_kernels(), setting, tokenizer=options.tokenizer)

    def show(piece: str) -> None:
        if not options.json:
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)

    result = generate(model, prompt, options, show=show)
    if not options.json:
        print(flush=True)
    console.log(
        f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s ({result.kernels});"
        f" prompt of {result.prompt_tokens} tokens in {result.prompt_seconds:.2f} s;"
        f" peak memory {peak_rss_bytes() / 1e9:.2f} GB; ended by {_WHY[result.finish_reason]}"
    )
    if advice := GenerationSettings(suggested=result.suggested).advice():
        console.log(advice)
    return Outcome(report=result)


COMMAND = Command(
    name="generate",
    summary="generate text with a checkpoint, a Hugging Face model, an exported file or an engine",
    example="rankbook generate onnx --prompt 'The capital of France is' --max-new-tokens 40",
    options=Generate,
    run=run,
)
