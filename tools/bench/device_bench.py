"""Times whole models on a GPU: engines, ONNX Runtime and PyTorch in interleaved turns of one process."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rankbook.tools.bench.options import DeviceOptions
from rankbook.tools.bench.subject import ModelSubject, random_tokens
from rankbook.tools.bench.timing import interleave, median_ratio
from rankbook.tools.errors import CommandError, describe, out_of_memory
from rankbook.tools.runtimes import LanguageModel, Setting

_ENGINE = "export it with --dtype fp16 --graph static{} and build that"
_FILE = "export it with --dtype fp16{}"
CONTENDERS: Mapping[str, str] = {
    "TensorRT, rankbook operators": "rankbook build CHECKPOINT",
    "TensorRT, INT4 DequantizeLinear": _ENGINE.format(" --dialect qdq"),
    "TensorRT, fp16": _ENGINE.format(" --dialect dense"),
    "ONNX Runtime CUDA, rankbook operators": _FILE.format(""),
    "ONNX Runtime CUDA, MatMulNBits": _FILE.format(" --dialect ort"),
    "ONNX Runtime CUDA, fp16": _FILE.format(" --dialect dense"),
    "PyTorch": "give the model itself as another MODEL",
}
"""What a whole comparison has, and how a missing one is made from a checkpoint."""
_WARM = 2
"""Turns of a model at each size that do not count: one that finds out whether it can, and that of `interleave`."""


@dataclass(frozen=True)
class Missing:
    """What was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """One contender at one size.

    Attributes:
        name: The subject.
        contender: What kind it is, of `CONTENDERS`.
        tokens: Decoding: tokens in the cache before the first step. Prefill: tokens of the prompt.
        batch: Texts side by side.
        p10: Milliseconds of a step, or until the first token is there, that 10 % stay below.
        p50: The same of half of them.
        p90: The same of 90 %.
        tokens_per_second: At the median, of all texts together.
        ratio: Median over turns of (the last subject's time / this time); None where that has no such cell.
        bandwidth_share: Decoding: bytes of the model's files in the median time, of what a copy moves; else None.
    """

    name: str
    contender: str
    tokens: int
    batch: int
    p10: float
    p50: float
    p90: float
    tokens_per_second: float
    ratio: float | None
    bandwidth_share: float | None = None


@dataclass(frozen=True)
class Footprint:
    """One contender's size.

    Attributes:
        name: The subject.
        contender: What kind it is.
        kernels: What computes packed layers.
        bits: Stored bits per weight of packed layers; None if there are none.
        file_bytes: The files that were opened.
        device_bytes: Device memory that was taken to open it and by its first turn at every size, so what it has at its
            peak; None if not known.
    """

    name: str
    contender: str
    kernels: str
    bits: float | None
    file_bytes: int
    device_bytes: int | None


@dataclass
class DeviceReport:
    """What was measured and what was not."""

    decode: list[Cell] = field(default_factory=list)
    prefill: list[Cell] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)


@dataclass(frozen=True)
class Instruments:
    """What is looked at beside the clock.

    Attributes:
        copy: Bytes per second that a copy within device memory moves, or None.
        free: Returns the free bytes of the device, or None.
        look: Called between cells.
    """

    copy: float | None = None
    free: Callable[[], int] | None = None
    look: Callable[[], None] = lambda: None


@dataclass
class DeviceRace:
    """Models that are open, and how they are measured."""

    options: DeviceOptions
    instruments: Instruments
    report: DeviceReport = field(default_factory=DeviceReport)
    models: dict[str, LanguageModel] = field(default_factory=dict)
    _taken: dict[str, int] = field(default_factory=dict)

    def run(self, subjects: Sequence[ModelSubject], progress: Callable[[float, str], None]) -> DeviceReport:
        """Open and measure every subject; what cannot be is listed with the reason.

        Raises:
            Exception: Nothing could be opened; that of the first one.
        """
        progress(0.0, "opening")
        self._open(subjects)
        options = self.options
        cells = [(context, batch) for context in options.contexts for batch in options.batches]
        total = len(cells) + len(options.prompts)
        for index, (context, batch) in enumerate(cells):
            self.instruments.look()
            show = _part(progress, index, total, f"decoding behind {context} tokens, batch {batch}")
            self.report.decode += self._decode(context, batch, show)
        for index, length in enumerate(options.prompts):
            self.instruments.look()
            show = _part(progress, len(cells) + index, total, f"prompt of {length} tokens")
            self.report.prefill += self._prefill(length, show)
        self.instruments.look()
        self.report.footprints = [self._footprint(name, model) for name, model in self.models.items()]
        seen = {kind(model) for model in self.models.values()}
        for name, how in CONTENDERS.items():
            if name not in seen:
                self.report.missing.append(Missing(name, f"no such model was given or could be opened; {how}"))
        return self.report

    def _open(self, subjects: Sequence[ModelSubject]) -> None:
        errors: list[Exception] = []
        options = self.options
        capacity = max(*(context + options.steps for context in options.contexts), *options.prompts) + 1
        for subject in subjects:
            try:
                with self._counted(subject.name):
                    model = subject.open(Setting(capacity=capacity, shared=True))
                    self._try(model, min(capacity - 1, max(options.prompts)))
            except Exception as error:
                errors.append(error)
                self.report.missing.append(Missing(subject.name, _reason(error)))
                continue
            self.models[subject.name] = model
        if not self.models:
            raise errors[0]

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Count the device memory that a model takes meanwhile."""
        free = self.instruments.free
        before = free() if free else 0
        yield
        if free:
            self._taken[name] = self._taken.get(name, 0) + max(0, before - free())

    def _footprint(self, name: str, model: LanguageModel) -> Footprint:
        packed, weights = model.packed
        bits = 8 * packed / weights if weights else None
        return Footprint(name, kind(model), model.kernels, bits, model.file_bytes, self._taken.get(name))

    @staticmethod
    def _try(model: LanguageModel, length: int) -> None:
        """Take what memory a long prompt and a step need."""
        length = min(length, (model.context or length + 1) - 1)
        model.step_best(model.start_best(list(random_tokens(length))).tolist())

    def _decode(self, context: int, batch: int, show: Callable[[float], None]) -> list[Cell]:
        """Decode greedily behind a context that is not timed."""
        tokens = [random_tokens(context)[0]] * batch
        steps: dict[str, list[float]] = {}

        def turn(name: str, model: LanguageModel) -> float:
            spans = []
            best = model.start_best(tokens)
            for _ in range(self.options.steps):
                begin = time.perf_counter()
                best = model.step_best(best.tolist())
                spans.append(time.perf_counter() - begin)
            steps.setdefault(name, []).extend(spans)
            return statistics.median(spans)

        size = f"decoding behind {context} tokens, batch {batch}"
        turns = self._turns(turn, context + self.options.steps, size, show)
        cells = [
            self._cell(name, (context, batch), steps[name][_WARM * self.options.steps :], turns, batch)
            for name in turns
        ]
        return [replace(cell, bandwidth_share=self._bandwidth_share(cell)) for cell in cells]

    def _prefill(self, length: int, show: Callable[[float], None]) -> list[Cell]:
        """Fill the cache from a prompt: the time until the first token is known on the host."""
        tokens = random_tokens(length)
        spans: dict[str, list[float]] = {}

        def turn(name: str, model: LanguageModel) -> float:
            begin = time.perf_counter()
            model.start_best(list(tokens))
            span = time.perf_counter() - begin
            spans.setdefault(name, []).append(span)
            return span

        turns = self._turns(turn, length, f"a prompt of {length} tokens", show)
        return [self._cell(name, (length, 1), spans[name][_WARM:], turns, length) for name in turns]

    def _turns(
        self,
        turn: Callable[[str, LanguageModel], float],
        positions: int,
        what: str,
        show: Callable[[float], None],
    ) -> dict[str, list[float]]:
        """Measure every model that can do it in turns."""
        able: dict[str, Callable[[], float]] = {}
        for name, model in self.models.items():
            try:
                model.check_room(positions, what)
                with self._counted(name):
                    turn(name, model)  # the first of the turns that do not count, `_WARM`
            except Exception as error:
                self.report.missing.append(Missing(f"{name}: {what}", _reason(error)))
                continue
            able[name] = lambda name=name, model=model: turn(name, model)  # type: ignore[misc]
        return interleave(able, self.options.repeats, show)

    def _cell(
        self, name: str, size: tuple[int, int], spans: list[float], turns: Mapping[str, list[float]], tokens: int
    ) -> Cell:
        """Summarize the seconds of one model; each of them gave ``tokens`` tokens."""
        model, last = self.models[name], list(self.models)[-1]
        middle = statistics.median(spans)
        return Cell(
            name=name,
            contender=kind(model),
            tokens=size[0],
            batch=size[1],
            p10=1e3 * _share(spans, 0.1),
            p50=1e3 * middle,
            p90=1e3 * _share(spans, 0.9),
            tokens_per_second=tokens / middle,
            ratio=median_ratio(turns[last], turns[name]) if last in turns and last != name else None,
        )

    def _bandwidth_share(self, cell: Cell) -> float | None:
        copy = self.instruments.copy
        return self.models[cell.name].file_bytes / (cell.p50 / 1e3) / copy if copy else None


def kind(model: LanguageModel) -> str:
    """Return which of `CONTENDERS` a model is; another name where it is none of them."""
    what = {"rankbook": "rankbook operators", "dense": model.dtype}
    if model.kernels.startswith("trt"):
        what["qdq"] = "INT4 DequantizeLinear"
        return f"TensorRT, {what.get(model.dialect, model.dialect)}"
    if model.dialect:
        where = "ONNX Runtime CUDA" if model.kernels == "native-cuda" else f"ONNX Runtime on the CPU ({model.kernels})"
        what["ort"] = "MatMulNBits"
        return f"{where}, {what.get(model.dialect, model.dialect)}"
    return "PyTorch"


def _reason(error: Exception) -> str:
    """Return why a model was not measured: it refuses, or does not fit. Other errors are raised again."""
    if isinstance(error, CommandError) or out_of_memory(error):
        return describe(error)[0]
    raise error


def _share(values: Sequence[float], share: float) -> float:
    import numpy as np

    return float(np.quantile(values, share))


def _part(progress: Callable[[float, str], None], index: int, total: int, what: str) -> Callable[[float], None]:
    return lambda fraction: progress((index + fraction) / total, what)
