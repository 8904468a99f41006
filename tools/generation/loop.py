"""Continues a prompt token by token, on any runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbook.calibration.option import Seeded, option
from rankbook.tools.errors import UsageError
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.generation.stream import TextStream
from rankbook.tools.runtimes.base import LanguageModel

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Logits


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
        text: The tokens.
        ids: Its tokens.
        prompt_tokens: Tokens of the prompt.
        tokens: Number of new tokens.
        kernels: What computed packed layers, see `LanguageModel`.
        finish_reason: ``stop`` at an end token or a stop string, ``length`` after the number of tokens asked for,
            ``context`` where the model can hold no more.
        suggested: Settings that the model comes with and that were not taken.
        prompt_seconds: Time for the prompt.
        tokens_per_second: Rate of the tokens after the first.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    tokens: int
    kernels: str
    finish_reason: str
    suggested: Mapping[str, Any]
    prompt_seconds: float
    tokens_per_second: float


def generate(stream: Stream, prompt: str, *, chat: bool = False) -> Generation:
    """Continue ``prompt``.

    Raises:
        UsageError: An empty prompt, one that fills the context, or a chat without a chat template.
    """
    tokenizer = stream.model.tokenizer
    ids = prompt_ids(tokenizer, prompt, chat)
    tokens = NextTokens(stream, ids)
    settings = tokens.settings
    text = TextStream(tokenizer, settings.stop_strings if stream.stop_at_end else ())
    start = time.perf_counter()
    produced: list[int] = []
    first = 0.0
    for token in tokens:
        if not produced:
            first = time.perf_counter() - start
        produced.append(token)
        stream.show(text.push(token))
        if text.stopped:
            break
    stream.show(text.finish())
    total = time.perf_counter() - start
    rate = (len(produced) - 1) / (total - first) if len(produced) > 1 else 0.0
    return Generation(
        text=text.text,
        ids=tuple(produced),
        prompt_tokens=len(ids),
        tokens=len(produced),
        kernels=stream.model.kernels,
        finish_reason="stop" if text.stopped else tokens.finish_reason,
        suggested=settings.suggested,
        prompt_seconds=first,
        tokens_per_second=rate,
    )


class NextTokens:
    """The tokens that continue a prompt, the end token excluded, computed while they are taken.

    Attributes:
        settings: What the model asks for.
        finish_reason: Why it ended, see `Generation`; known at the end.
    """

    def __init__(self, stream: Stream, ids: Sequence[int]) -> None:
        """Look whether there is room behind the prompt ``ids``.

        Raises:
            UsageError: There is none.
        """
        self._stream, self._ids = stream, list(ids)
        self.settings = GenerationSettings.of(stream.model.generation_config, stream.model.tokenizer)
        self.finish_reason = "length"
        context = stream.model.context
        if context is not None and len(self._ids) >= context:
            raise UsageError(
                f"the prompt has {len(self._ids)} tokens and {stream.model.name} holds {context}, new ones included;"
                " give a shorter prompt"
            )
        self._room = stream.max_new_tokens if context is None else min(stream.max_new_tokens, context - len(self._ids))

    def __iter__(self) -> Iterator[int]:
        """Compute one token after the other."""
        import numpy as np

        wanted, model = self._stream.max_new_tokens, self._stream.model
        generator = np.random.default_rng(self._stream.sampling.seed)
        ids = list(self._ids)
        for index in range(self._room):
            scores = model.step(ids[-1]) if index else model.start(np.array([ids], np.int64))
            scores = self.settings.allow(scores, ids, index, last=index + 1 == wanted)
            token = choose(scores, self._stream.sampling, generator)
            if self._stream.stop_at_end and token in self.settings.end_tokens:
                self.finish_reason = "stop"
                return
            ids.append(token)
            yield token
        self.finish_reason = "length" if self._room == wanted else "context"


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
