"""How well a model predicts a text, on any runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.notes import note
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.options import EvalOptions

if TYPE_CHECKING:
    from rankbook.calibration.evaluate import EvalResult
    from rankbook.calibration.text import Text
    from rankbook.tools.runtimes.base import LanguageModel


def evaluate(
    model: LanguageModel,
    text: str | Path | Text,
    options: EvalOptions | None = None,
    *,
    reference: LanguageModel | None = None,
    progress: Callable[[float], None] | None = None,
) -> EvalResult:
    """Measure perplexity on a text, and divergence from a reference.

    >>> model, original = rankbook.open_model("checkpoint"), rankbook.open_model("model")
    >>> options = rankbook.EvalOptions(context=32, max_tokens=128)
    >>> result = rankbook.evaluate(model, "text.txt", options, reference=original)
    >>> result.tokens, result.kl > 0
    (124, True)

    Args:
        model: What `rankbook.open_model` returns; it must give the logits of every position.
        text: .txt, .jsonl or .json file, a `datasets` name, or what `rankbook.calibration.text.read_text` found.
        options: Windows and how many of them.
        reference: The unquantized model; without it there is no divergence.
        progress: Called with the fraction done.

    A text that is shorter than asked is said in a `Note`.

    Raises:
        ValueError: The text is missing, empty or too short, or the two models do not fit each other.
        UsageError: There is no tokenizer, or the model gives the last logits only.
    """
    from rankbook.calibration import evaluate as judge
    from rankbook.calibration.data import token_windows
    from rankbook.calibration.text import Text, read_text

    options = options or EvalOptions()
    text = text if isinstance(text, Text) else read_text(text, chat=options.chat)
    tokenizer = model.tokenizer or (reference.tokenizer if reference else None)
    if tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer; name a model that has it: --tokenizer MODEL")
    context = options.context
    for held in (model, reference):
        if held is not None and held.context is not None and held.context < context:
            context = held.context
            note(f"{held.name} holds {context} positions: windows have {context} tokens instead of {options.context}")
    wanted = None if options.max_tokens is None else max(1, -(-options.max_tokens // context))
    windows = token_windows(tokenizer, text, context, most=wanted)
    count, length = windows.tokens.shape
    if length < context or count < (wanted or 1):
        asked = f"{wanted or 'windows'} x {context}"
        note(f"{text.name} is short: evaluated on {count} x {length} tokens instead of {asked}; give more text")
    compared = None if reference is None else _logits(reference)
    given = len(windows.prefix)
    result = judge.evaluate(
        _logits(model), windows.tokens, compared, batch=options.batch, given=given, progress=progress
    )
    asked_for = {"context": options.context, "max_tokens": options.max_tokens}
    return replace(result, windows={**windows.describe(tokenizer), "asked": asked_for})


def _logits(model: LanguageModel) -> Any:
    return lambda tokens: model.logits(tokens.numpy())
