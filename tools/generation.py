"""Continues a prompt token by token, on any runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankbook.calibration.option import Seeded, option
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes.base import LanguageModel

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Logits

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character whose other bytes come with the next token."""


@dataclass(frozen=True)
class Sampling(Seeded):
    """How the next token is chosen."""

    temperature: float = option(0.0, "0 is greedy", metavar="T")
    top_p: float = option(1.0, "sample from the smallest set with this probability", metavar="P")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature < 0:
            raise UsageError(f"temperature {self.temperature} is negative; 0 is greedy, 1 samples as the model says")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not a probability; give a number above 0 and at most 1")


@dataclass(frozen=True)
class Stream:
    """A generation to run: the model, how to choose, when to stop, and where text goes as it comes."""

    model: LanguageModel
    sampling: Sampling
    max_new_tokens: int
    stop_at_end: bool = True
    show: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        text: The continuation.
        ids: Its tokens.
        prompt_tokens: Tokens of the prompt.
        tokens: Number of new tokens.
        kernels: What computed packed layers, see `LanguageModel`.
        prompt_seconds: Time for the prompt.
        tokens_per_second: Rate of the tokens after the first.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    kernels: str
    prompt_seconds: float
    tokens_per_second: float


def generate(stream: Stream, prompt: str, *, chat: bool = False) -> Generation:
    """Continue ``prompt``.

    Raises:
        UsageError: An empty prompt, or a chat without a chat template.
    """
    tokenizer = stream.model.tokenizer
    ids = prompt_ids(tokenizer, prompt, chat)
    start = time.perf_counter()
    produced: list[int] = []
    shown, first = "", 0.0
    for token in continue_ids(stream, ids):
        if not produced:
            first = time.perf_counter() - start
        produced.append(token)
        text = tokenizer.decode(produced, skip_special_tokens=True)
        if not text.endswith(_UNFINISHED):
            stream.show(text[len(shown) :])
            shown = text
    text = tokenizer.decode(produced, skip_special_tokens=True)
    stream.show(text[len(shown) :])
    total = time.perf_counter() - start
    rate = (len(produced) - 1) / (total - first) if len(produced) > 1 else 0.0
    return Generation(
        text=text,
        ids=tuple(produced),
        prompt_tokens=len(ids),
        tokens=len(produced),
        kernels=stream.model.kernels,
        prompt_seconds=first,
        tokens_per_second=rate,
    )


def continue_ids(stream: Stream, ids: list[int]) -> Iterator[int]:
    """Yield the tokens that continue ``ids``, the end token excluded."""
    import numpy as np

    generator = np.random.default_rng(stream.sampling.seed)
    ends = end_tokens(stream.model) if stream.stop_at_end else set()
    if stream.max_new_tokens < 1:
        return
    scores = stream.model.start(np.array([ids], np.int64))
    for index in range(stream.max_new_tokens):
        token = choose(scores, stream.sampling, generator)
        if token in ends:
            return
        yield token
        if index + 1 < stream.max_new_tokens:
            scores = stream.model.step(token)


def choose(scores: Logits, sampling: Sampling, generator: np.random.Generator) -> int:
    """Return the next token from logits (vocabulary,)."""
    import numpy as np

    if sampling.temperature == 0:
        return int(scores.argmax())
    scaled = scores.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # The token that crosses the threshold belongs to the set, so that it is never empty.
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), sampling.top_p) + 1)]
    weights = probabilities[kept] / probabilities[kept].sum()
    return int(generator.choice(kept, p=weights))


def end_tokens(model: LanguageModel) -> set[int]:
    """Return the tokens that end a text: those of the generation configuration and of the tokenizer."""
    ends: set[int] = set()
    settings = getattr(getattr(model, "model", None), "generation_config", None)
    for owner in (settings, model.tokenizer):
        value = getattr(owner, "eos_token_id", None)
        ends |= set(value) if isinstance(value, (list, tuple)) else {value} if value is not None else set()
    return ends


def prompt_ids(tokenizer: object, prompt: str, chat: bool = False) -> list[int]:
    """Return the tokens of a prompt, in the chat template if asked.

    Raises:
        UsageError: An empty prompt, or a chat without a chat template.
    """
    if chat:
        template = getattr(tokenizer, "chat_template", None)
        if template is None:
            raise UsageError("the tokenizer has no chat template; leave --chat out and give the whole prompt")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    else:
        ids = tokenizer(prompt)["input_ids"]  # type: ignore[operator]
    if not ids:
        raise UsageError("the prompt is empty; give --prompt TEXT or text on stdin")
    return list(ids)
