"""Times decoding and prefill of whole models, exported ones and those of peers, in interleaved turns of one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankbook.tools.bench.memory import Memory, measure_memory
from rankbook.tools.bench.options import ModelOptions
from rankbook.tools.bench.subject import ModelSubject, random_tokens
from rankbook.tools.bench.timing import clock, interleave, median_ratio, seconds
from rankbook.tools.runtimes import LanguageModel, Setting, runtimes


@dataclass(frozen=True)
class ModelRace:
    """The models, and how they are measured."""

    subjects: tuple[ModelSubject, ...]
    options: ModelOptions

    @property
    def references(self) -> tuple[str, ...]:
        """Names of what the others are compared with: the peers, or the last model where there are none."""
        peers = tuple(subject.name for subject in self.subjects if subject.is_peer)
        return peers or (self.subjects[-1].name,)

    @property
    def clock_threads(self) -> int | None:
        """What `clock` is chosen by: a thread that waits for a GPU spends no time of its own."""
        cuda = any(item.cuda for item in map(runtimes().get, (subject.runtime for subject in self.subjects)) if item)
        return None if cuda else self.options.threads


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        name: The subject.
        kernels: What computed packed layers.
        bits: Stored bits per weight of packed layers and embeddings (llama.cpp: of everything); None if there are none.
        packed_bytes: Their constants.
        decode: Tokens per second, median.
        decode_best: Tokens per second of the best turn.
        decode_ratios: By reference, median over turns of (this / the reference).
        prefill: Tokens per second, median, or None.
        prefill_ratios: As `decode_ratios`.
        memory: Of a process of its own.
    """

    name: str
    kernels: str
    bits: float | None
    packed_bytes: int
    decode: float
    decode_best: float
    decode_ratios: Mapping[str, float]
    prefill: float | None
    prefill_ratios: Mapping[str, float]
    memory: Memory


def measure_models(race: ModelRace, progress: Callable[[float, str], None]) -> list[ModelResult]:
    """Time every subject.

    Raises:
        MissingError: A runtime or the native library is missing.
        UsageError: A runtime refuses its model.
        CheckFailedError: The process that measures memory failed.
    """
    options = race.options
    capacity = max(options.prompt + options.steps, options.prefill) + 1
    setting = Setting(options.threads, capacity, shared=len(race.subjects) > 1)
    models = {subject.name: subject.open(setting) for subject in race.subjects}
    progress(0.0, "decoding")
    decode = interleave(
        {name: decode_rate(model, race) for name, model in models.items()},
        options.repeats,
        lambda fraction: progress(0.5 * fraction, "decoding"),
    )
    prefill: dict[str, list[float]] = {}
    if options.prefill:
        prefill = interleave(
            {name: prefill_rate(model, race) for name, model in models.items()},
            options.repeats,
            lambda fraction: progress(0.5 + 0.3 * fraction, "prefill"),
        )
    results = []
    for index, subject in enumerate(race.subjects):
        progress(0.8 + 0.2 * index / len(race.subjects), "memory")
        model = models[subject.name]
        packed, weights = model.packed
        mine = prefill.get(subject.name)
        results.append(
            ModelResult(
                name=subject.name,
                kernels=model.kernels,
                bits=8 * packed / weights if weights else None,
                packed_bytes=packed,
                decode=statistics.median(decode[subject.name]),
                decode_best=max(decode[subject.name]),
                decode_ratios=_ratios(decode, subject.name, race.references),
                prefill=None if mine is None else statistics.median(mine),
                prefill_ratios={} if mine is None else _ratios(prefill, subject.name, race.references),
                memory=measure_memory(subject, options.threads),
            )
        )
    return results


def _ratios(rates: Mapping[str, Sequence[float]], name: str, references: Sequence[str]) -> dict[str, float]:
    return {reference: median_ratio(rates[name], rates[reference]) for reference in references if reference != name}


def decode_rate(model: LanguageModel, race: ModelRace) -> Callable[[], float]:
    """Return a subject that decodes greedily behind a prompt and gives tokens per second, the prompt not counted."""
    now, options = clock(race.clock_threads), race.options
    tokens = random_tokens(options.prompt)

    def run() -> float:
        scores = model.start(tokens)
        start = now()
        for _ in range(options.steps):
            scores = model.step(int(scores.argmax()))
        return options.steps / (now() - start)

    return run


def prefill_rate(model: LanguageModel, race: ModelRace) -> Callable[[], float]:
    """Return a subject that fills the cache from the tokens of the prefill and gives tokens per second."""
    tokens = random_tokens(race.options.prefill)
    one = seconds(lambda: model.start(tokens), race.clock_threads)
    return lambda: race.options.prefill / one()
