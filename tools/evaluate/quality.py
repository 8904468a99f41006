"""How well a model predicts a text, on any runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.options import EvalOptions

if TYPE_CHECKING:
    from rankbook.calibration.evaluate import EvalResult
    from rankbook.tools.runtimes.base import LanguageModel


def evaluate(
    model: LanguageModel,
    text: str | Path,
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
        text: .txt or .jsonl file, or a `datasets` name.
        options: Windows and how many of them.
        reference: The unquantized model; without it there is no divergence.
        progress: Called with the fraction done.

    Raises:
        ValueError: The text is missing, empty or too short, or the two models do not fit each other.
        UsageError: There is no tokenizer, or the model gives the last logits only.
    """
    from rankbook.calibration.data import read_text

    return measure(model, read_text(text), options or EvalOptions(), reference, progress, what=str(text))


def measure(
    model: LanguageModel,
    text: str,
    options: EvalOptions,
    reference: LanguageModel | None = None,
    progress: Callable[[float], None] | None = None,
    *,
    what: str = "the text",
) -> EvalResult:
    """Do the work of `evaluate` on the text itself, which messages call ``what``."""
    from rankbook.calibration import evaluate as judge
    from rankbook.calibration.data import token_windows

    tokenizer = model.tokenizer or (reference.tokenizer if reference else None)
    if tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer; name a model that has it: --tokenizer MODEL")
    windows = token_windows(tokenizer, text, options.context, what=what)
    if options.max_tokens is not None:
        windows = windows[: max(1, -(-options.max_tokens // options.context))]
    compared = None if reference is None else _logits(reference)
    return judge.evaluate(_logits(model), windows, compared, batch=options.batch, progress=progress)


def _logits(model: LanguageModel) -> Any:
    return lambda tokens: model.logits(tokens.numpy())
