"""Do two models continue the same prompts with the same tokens? Greedy decoding, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rankbook.tools.errors import UsageError
from rankbook.tools.generation.loop import prompt_ids
from rankbook.tools.runtimes.base import LanguageModel

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small boat that",
    "To make good bread you need flour, water and",
    "def fibonacci(n):",
    "The three laws of thermodynamics say that",
)
"""Prose, instructions and code, so that the continuations differ in kind."""


@dataclass(frozen=True)
class GreedyCheck:
    """One prompt continued by both models.

    Attributes:
        prompt: The prompt.
        tokens: New tokens compared.
        same: How many of them agree before the first difference.
        margin: At the first difference, how much more the first model prefers its own token to the other's, relative to
            its largest absolute logit; None without a difference.
        generated: How many of the tokens compared the library's own loop gives, too (``generate`` of transformers);
            None where the first model has none.
        passed: No difference to either, or one where the first model's preference is within tolerance: a tie.
    """

    prompt: str
    tokens: int
    same: int
    margin: float | None
    passed: bool
    generated: int | None = None


def compare_greedy(
    first: LanguageModel,
    second: LanguageModel,
    new_tokens: int,
    tolerance: float,
    note: Callable[[float], None] = lambda _: None,
    prompts: Sequence[str] = PROMPTS,
) -> tuple[GreedyCheck, ...]:
    """Continue each prompt by ``new_tokens`` tokens with the first model and follow with the second.

    The second model is fed with the tokens of the first, so its own choice is known at every position; the comparison
    of a prompt ends at the first difference, since texts that differ once are different texts. The tokens of the first
    are also compared with those of its library's own loop, so that a fault of the loop here cannot hide in both.

    Args:
        first: The model that decides.
        second: The model that is compared with it.
        new_tokens: Tokens per prompt; the end token does not stop it.
        tolerance: Largest relative preference that counts as a tie.
        note: Called with the fraction done.
        prompts: What to continue.

    Raises:
        UsageError: There is no tokenizer, ``new_tokens`` is less than 1, or a model holds less positions.
    """
    if new_tokens < 1:
        raise UsageError(f"{new_tokens} tokens cannot be compared; give at least 1")
    if first.tokenizer is None:
        raise UsageError(f"{first.name} has no tokenizer, so no prompt can be continued; leave the greedy check out")
    checks = []
    for index, prompt in enumerate(prompts):
        note(index / len(prompts))
        checks.append(_follow(first, second, prompt, new_tokens, tolerance))
    return tuple(checks)


def _follow(first: LanguageModel, second: LanguageModel, prompt: str, new_tokens: int, tolerance: float) -> GreedyCheck:
    import numpy as np

    tokens = np.array([prompt_ids(first.tokenizer, prompt)], np.int64)
    for model in (first, second):
        model.check_room(tokens.shape[1] + new_tokens, f"a greedy check of {new_tokens} tokens")
    wanted = first.generated(tokens, new_tokens)
    mine, other = first.start(tokens), second.start(tokens)
    for index in range(new_tokens):
        token, generated = int(mine.argmax()), None if wanted is None else index
        for choice in (int(other.argmax()), token if wanted is None else wanted[index]):
            if token != choice:
                margin = float((mine[token] - mine[choice]) / np.abs(mine).max())
                return GreedyCheck(prompt, new_tokens, index, margin, margin <= tolerance, generated)
        if index + 1 < new_tokens:
            mine, other = first.step(token), second.step(token)
    return GreedyCheck(prompt, new_tokens, new_tokens, None, True, None if wanted is None else new_tokens)
