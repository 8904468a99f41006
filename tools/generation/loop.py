"""Continues a prompt token by token, on any runtime."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankbook.calibration.option import Seeded, option
from rankbook.tools.errors import UsageError
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.generation.stream import TextStream
from rankbook.tools.runtimes.base import LanguageModel, best_tokens, check_finite

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GenerateOptions(Seeded):
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = option(128, "largest number of tokens to generate", metavar="N", least=1)
    chat: bool = option(False, "wrap the prompt in the model's chat template")
    ignore_eos: bool = option(False, "continue after the end token")
    temperature: float = option(0.0, "0 is greedy", metavar="T")
    top_k: int = option(0, "sample from the N best tokens; 0 is all", metavar="N", least=0)
    top_p: float = option(1.0, "sample from the smallest set with this probability", metavar="P")

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(
                f"temperature {self.temperature} is negative or not finite; 0 is greedy, 1 samples as the model says"
            )
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is not a probability; give a number above 0 and at most 1")


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


def generate(
    model: LanguageModel,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    show: Callable[[str], None] = lambda _: None,
) -> Generation:
    """Continue ``prompt``.

    >>> model = rankbook.open_model("onnx")
    >>> result = rankbook.generate(model, "the", rankbook.GenerateOptions(max_new_tokens=4, ignore_eos=True))
    >>> result.tokens, result.finish_reason
    (4, 'length')

    Args:
        model: What `rankbook.open_model` returns.
        prompt: Text; with ``options.chat`` what the user says.
        options: The defaults, greedy, without.
        show: Called with the text as it comes.

    Raises:
        UsageError: No tokenizer, an empty prompt, one that fills the context, or a chat without a chat template.
        CheckFailedError: The model gives logits that are NaN or infinite.
    """
    options, tokenizer = options or GenerateOptions(), model.tokenizer
    if tokenizer is None:
        raise UsageError(f"{model.name} has no tokenizer; name a model that has it: --tokenizer MODEL")
    ids = prompt_ids(tokenizer, prompt, options.chat)
    tokens = NextTokens(model, ids, options)
    settings = tokens.settings
    text = TextStream(tokenizer, () if options.ignore_eos else settings.stop_strings)
    start = time.perf_counter()
    produced: list[int] = []
    first = 0.0
    for token in tokens:
        if not produced:
            first = time.perf_counter() - start
        produced.append(token)
        show(text.push(token))
        if text.stopped:
            break
    show(text.finish())
    total = time.perf_counter() - start
    rate = (len(produced) - 1) / (total - first) if len(produced) > 1 else 0.0
    return Generation(
        text=text.text,
        ids=tuple(produced),
        prompt_tokens=len(ids),
        tokens=len(produced),
        kernels=model.kernels,
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

    def __init__(self, model: LanguageModel, ids: Sequence[int], options: GenerateOptions) -> None:
        """Look whether there is room behind the prompt ``ids``.

        Raises:
            UsageError: There is none.
        """
        self._model, self._ids, self._options = model, list(ids), options
        self.settings = GenerationSettings.of(model.generation_config, model.tokenizer)
        self.finish_reason = "length"
        context = model.context
        if context is not None and len(self._ids) >= context:
            raise UsageError(
                f"the prompt has {len(self._ids)} tokens and {model.name} holds {context}, new ones included;"
                " give a shorter prompt"
            )
        wanted = options.max_new_tokens
        self._room = wanted if context is None else min(wanted, context - len(self._ids))

    def __iter__(self) -> Iterator[int]:
        """Compute one token after the other."""
        import numpy as np

        options, ids = self._options, list(self._ids)
        generator = np.random.default_rng(options.seed)
        for index in range(self._room):
            token = self._next(ids, index, generator)
            if not options.ignore_eos and token in self.settings.end_tokens:
                self.finish_reason = "stop"
                return
            ids.append(token)
            yield token
        self.finish_reason = "length" if self._room == options.max_new_tokens else "context"

    def _next(self, ids: Sequence[int], index: int, generator: np.random.Generator) -> int:
        """Return the token behind ``ids``, of which ``index`` are new."""
        import numpy as np

        model, options = self._model, self._options
        if options.temperature == 0 and not self.settings.restricts:
            best = model.step_best([ids[-1]]) if index else model.start_best([np.array(ids, np.int64)])
            return int(best[0])
        count = options.top_k if options.temperature else 0
        if count and not self.settings.restricts:
            found = model.step_top([ids[-1]], count) if index else model.start_top([np.array(ids, np.int64)], count)
        else:
            scores = model.step(ids[-1]) if index else model.start(np.array([ids], np.int64))
            scores = self.settings.allow(scores, ids, index, last=index + 1 == options.max_new_tokens)
            if not count:
                return choose(scores, options, generator)
            found = best_tokens(scores[None], count)
        scores, tokens = found[0]
        return int(tokens[choose(scores, options, generator)])


def choose(scores: Array, options: GenerateOptions, generator: np.random.Generator) -> int:
    """Return the place of the next token among logits (tokens,).

    Raises:
        CheckFailedError: They are NaN or infinite; minus infinity is a token that is not allowed.
    """
    import numpy as np

    best = int(scores.argmax())
    check_finite(scores[best])
    if options.temperature == 0:
        return best
    # Differences first: a quotient by a small temperature may pass the largest number.
    with np.errstate(over="ignore"):
        probabilities = np.exp((scores.astype(np.float64) - scores[best]) / options.temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    # The token that crosses the threshold belongs to the set, so that it is never empty.
    kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), options.top_p) + 1)]
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
