"""Which texts a step moves: requests wait in a queue, take a free row, and leave it when they end or are cancelled."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankbook.tools.errors import CheckFailedError, UsageError
from rankbook.tools.generation.loop import GenerateOptions, choose
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.generation.stream import TextStream

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.runtimes.base import Logits
    from rankbook.tools.serve.slots import Slots

_CHUNK = 128
"""Tokens of prompts between two steps: more would make everyone wait. Short prompts that came together are computed
before the next step, so that their texts go on side by side from the first one."""


class BusyError(Exception):
    """The queue is full, or the server is going down."""


@dataclass(frozen=True)
class Piece:
    """What a request gets at a time.

    Attributes:
        text: New text, maybe empty.
        token: The token that was chosen, or None.
        logprob: Its logarithmic probability, 0 where the request does not ask for it.
        top: The most likely tokens with theirs, as many as were asked for.
        finish_reason: At the end ``stop``, ``length``, ``context``, ``cancelled`` or ``error``.
        message: Of an error.
    """

    text: str = ""
    token: int | None = None
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    message: str = ""


@dataclass
class Request:
    """A text to be continued.

    Attributes:
        ids: Tokens of the prompt.
        options: How.
        stop: Strings that end it.
        top: How many of the most likely tokens are told with each, and its probability; None for neither.
        deliver: Called with each piece, in the scheduler's thread.
        cancelled: Set by whoever no longer wants it.
    """

    ids: Sequence[int]
    options: GenerateOptions
    deliver: Callable[[Piece], None]
    stop: tuple[str, ...] = ()
    top: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Row:
    """A request that has a row of the cache."""

    request: Request
    ids: list[int]
    stream: TextStream
    generator: np.random.Generator
    filled: int = 0
    produced: int = 0


@dataclass
class Counters:
    """What happened since the start; read by the metrics.

    Attributes:
        waiting: Requests in the queue now.
        active: Requests with a row now.
        steps: Steps that were computed.
        prompt_tokens: Tokens of prompts that were computed.
        tokens: Tokens that were chosen.
        finished: Requests by how they ended.
    """

    waiting: int = 0
    active: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Decodes requests side by side in a thread of its own."""

    def __init__(self, slots: Slots, tokenizer: Any, settings: GenerationSettings, *, queue: int) -> None:
        """Start the thread.

        Args:
            slots: Rows of the cache.
            tokenizer: Of the model.
            settings: What the model asks for.
            queue: Requests that may wait; further ones are refused.
        """
        self._slots, self._tokenizer, self.settings, self._queue = slots, tokenizer, settings, queue
        self.counters = Counters()
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, _Row] = {}
        self._change = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="rankbook-scheduler", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, request: Request) -> None:
        """Put a request into the queue.

        Raises:
            UsageError: Its prompt leaves no room for a token.
            BusyError: The queue is full, or the server is going down.
        """
        if not request.ids:
            raise UsageError("the prompt is empty")
        if len(request.ids) >= self._slots.context:
            raise UsageError(
                f"the prompt has {len(request.ids)} tokens and the context holds {self._slots.context}, new ones too"
            )
        with self._change:
            if self._stopping or len(self._waiting) >= self._queue:
                why = "the server is going down" if self._stopping else f"{self._queue} requests are waiting already"
                raise BusyError(f"{why}; try again later")
            self._waiting.append(request)
            self._change.notify()

    def stop(self, seconds: float = 5.0) -> None:
        """End: whoever waits or is in the middle gets an error piece."""
        with self._change:
            self._stopping = True
            self._change.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._change:
                while not (self._stopping or self._waiting or self._rows):
                    self._change.wait()
                if self._stopping:
                    break
            self._turn()
        self._fail_all("the server is going down")

    def _turn(self) -> None:
        """Compute a piece of the prompts and a step of every text behind its prompt."""
        try:
            self._admit()
            self._fill()
            self._step()
        except Exception as error:
            self._fail_all(f"{type(error).__name__}: {error}")
        self.counters.waiting, self.counters.active = len(self._waiting), len(self._rows)

    def _admit(self) -> None:
        """Drop what is no longer wanted; give free rows to those who wait."""
        import numpy as np

        for slot in [slot for slot, row in self._rows.items() if row.request.cancelled.is_set()]:
            self._leave(slot, "cancelled")
        free = [slot for slot in range(self._slots.count) if slot not in self._rows]
        while free and self._waiting:
            request = self._waiting.popleft()
            if request.cancelled.is_set():
                self._count("cancelled")
                continue
            stops = () if request.options.ignore_eos else self.settings.stop_strings
            stream = TextStream(self._tokenizer, (*request.stop, *stops))
            generator = np.random.default_rng(request.options.seed)
            self._rows[free.pop(0)] = _Row(request, list(request.ids), stream, generator)

    def _fill(self) -> None:
        """Compute the next tokens of the prompts, those that came first before the others."""
        import numpy as np

        room = _CHUNK
        for slot, row in [(s, r) for s, r in self._rows.items() if r.filled < len(r.request.ids)]:
            piece = np.array(row.request.ids[row.filled : row.filled + room], np.int64)
            scores = self._slots.extend(slot, piece)
            row.filled += len(piece)
            room -= len(piece)
            self.counters.prompt_tokens += len(piece)
            if row.filled == len(row.request.ids):
                self._choose(slot, row, scores)
            if not room:
                break

    def _step(self) -> None:
        given = {slot: row.ids[-1] for slot, row in self._rows.items() if row.produced}
        if not given:
            return
        self.counters.steps += 1
        for slot, scores in self._slots.step(given).items():
            self._choose(slot, self._rows[slot], scores)

    def _choose(self, slot: int, row: _Row, scores: Logits) -> None:
        """Choose the next token of a row and tell it; end the text where it ends."""
        request, options = row.request, row.request.options
        last = row.produced + 1 == options.max_new_tokens
        try:
            token = choose(self.settings.allow(scores, row.ids, row.produced, last=last), options, row.generator)
        except CheckFailedError as error:  # of this text; others go on
            self._leave(slot, "error", str(error))
            return
        if not options.ignore_eos and token in self.settings.end_tokens:
            self._leave(slot, "stop")
            return
        row.ids.append(token)
        row.produced += 1
        self.counters.tokens += 1
        text = row.stream.push(token)
        # Over a large vocabulary this takes as long as a part of the step itself.
        logprob, top = (0.0, ()) if request.top is None else _logprobs(scores, token, request.top)
        request.deliver(Piece(text, token, logprob, top))
        if row.stream.stopped:
            self._leave(slot, "stop")
        elif last:
            self._leave(slot, "length")
        elif len(row.ids) >= self._slots.context:
            self._leave(slot, "context")

    def _leave(self, slot: int, reason: str, message: str = "") -> None:
        row = self._rows.pop(slot)
        self._slots.clear(slot)
        self._count(reason)
        row.request.deliver(Piece(row.stream.finish(), finish_reason=reason, message=message))

    def _fail_all(self, message: str) -> None:
        for slot in list(self._rows):
            self._leave(slot, "error", message)
        with self._change:
            waiting = [*self._waiting]
            self._waiting.clear()
        for request in waiting:
            self._count("error")
            request.deliver(Piece(finish_reason="error", message=message))

    def _count(self, reason: str) -> None:
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1


def _logprobs(scores: Logits, token: int, top: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the logarithmic probability of a token, and the ``top`` most likely tokens with theirs."""
    import numpy as np

    values = scores.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = np.argsort(-values, kind="stable")[:top]
    return float(values[token]), tuple((int(item), float(values[item])) for item in best)
