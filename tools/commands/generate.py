"""``rankbook generate``: stream text from a checkpoint, any Hugging Face model, or an exported file."""

from __future__ import annotations

import argparse
import sys

from rankbook.tools.command import Command, Flags, Outcome
from rankbook.tools.console import Console, peak_rss
from rankbook.tools.errors import UsageError
from rankbook.tools.generation import Sampling, Stream, generate
from rankbook.tools.kernel_flags import add_kernel_flags, chosen_kernels
from rankbook.tools.models import open_model


def add_flags(flags: Flags) -> None:
    """Declare the flags."""
    flags.add(
        "model", metavar="MODEL", required=True, text="checkpoint, Hugging Face model, GGUF, exported folder or .onnx"
    )
    flags.add("-p", "--prompt", metavar="TEXT", text="prompt; read from stdin when not given")
    flags.add("--chat", action="store_true", default=False, text="wrap the prompt in the model's chat template")
    flags.add("--max-new-tokens", type=int, default=128, metavar="N", text="most tokens to generate")
    flags.add("--temperature", type=float, default=0.0, metavar="T", text="0 is greedy")
    flags.add(
        "--top-p", type=float, default=1.0, metavar="P", text="sample from the smallest set with this probability"
    )
    flags.add("--tokenizer", metavar="MODEL", text="take the tokenizer from this model when MODEL has none")
    add_kernel_flags(flags)
    flags.add("--ignore-eos", action="store_true", default=False, text="go on after the end token")


def run(options: argparse.Namespace) -> Outcome:
    """Generate; the text goes to stdout as it comes, tokens per second to stderr."""
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    console = Console(quiet=options.quiet)
    prompt = options.prompt if options.prompt is not None else sys.stdin.read()
    model = open_model(
        options.model, threads=options.threads, tokenizer=options.tokenizer, kernels=chosen_kernels(options)
    )
    if model.tokenizer is None:
        raise UsageError(f"{options.model} has no tokenizer; name a model that has it: --tokenizer MODEL")

    def show(piece: str) -> None:
        if not options.json:
            print(piece, end="", flush=True)

    stream = Stream(model, sampling, options.max_new_tokens, stop_at_end=not options.ignore_eos, show=show)
    result = generate(stream, prompt, chat=options.chat)
    if not options.json:
        print(flush=True)
    console.log(
        f"{result.tokens} tokens, {result.tokens_per_second:.1f} tokens/s ({result.kernels});"
        f" prompt of {result.prompt_tokens} tokens in {result.prompt_seconds:.2f} s;"
        f" peak memory {peak_rss() / 1e9:.2f} GB"
    )
    return Outcome(report=result)


COMMAND = Command(
    name="generate",
    summary="stream text from a checkpoint, a Hugging Face model or an exported file",
    example="rankbook generate onnx --prompt 'The capital of France is' --max-new-tokens 40",
    add_flags=add_flags,
    run=run,
)
