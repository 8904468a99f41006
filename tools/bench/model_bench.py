"""Times decoding and prefill of whole models in interleaved turns, and the memory of each in a process of its own."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rankbook.tools import onnx_file
from rankbook.tools.backends.base import LanguageModel
from rankbook.tools.backends.ort import KERNELS, OrtModel, find_tokenizer
from rankbook.tools.bench.timing import clock, interleave, median_ratio, seconds
from rankbook.tools.errors import CheckFailedError, UsageError
from rankbook.tools.onnx_file import OnnxFile


@dataclass(frozen=True)
class ModelSubject:
    """An exported model and what computes its packed layers.

    Attributes:
        path: Exported folder or file.
        kernels: One of `rankbook.tools.backends.ort.KERNELS`.
    """

    path: Path
    kernels: str = "auto"

    @classmethod
    def parse(cls, text: str, kernels: str) -> ModelSubject:
        """Read ``PATH`` or ``PATH@KERNELS``; ``kernels`` is for what does not say.

        Raises:
            UsageError: Nothing lies at the path.
        """
        path, _, wanted = text.rpartition("@")
        if not path or wanted not in KERNELS:
            path, wanted = text, kernels
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist; give exported folders or .onnx files, with @{'|@'.join(KERNELS)}")
        return cls(Path(path), wanted)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.path}@{self.kernels}"


@dataclass(frozen=True)
class ModelOptions:
    """What to measure.

    Attributes:
        subjects: The models; ratios are against the last one.
        threads: Threads; ONNX Runtime's choice when None.
        repeats: Turns.
        prompt: Tokens before decoding begins.
        steps: Tokens decoded in a turn.
        prefill: Tokens of the prefill; 0 leaves it out.
    """

    subjects: tuple[ModelSubject, ...]
    threads: int | None
    repeats: int
    prompt: int
    steps: int
    prefill: int


@dataclass(frozen=True)
class Memory:
    """What a fresh process needed to open a model and decode.

    Attributes:
        file_bytes: The model and its external data.
        peak_rss: Largest resident memory, bytes; mapped files count.
        baseline_rss: The same before the model was opened: Python, its libraries and the tokenizer.
    """

    file_bytes: int
    peak_rss: int
    baseline_rss: int


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        name: The subject.
        kernels: What computed packed layers.
        bits: Stored bits per weight of packed layers and embeddings, or None if there are none.
        packed_bytes: Their constants.
        decode: Tokens per second, median.
        decode_best: Tokens per second of the best turn.
        decode_ratio: Median over turns of (this / the last subject).
        prefill: Tokens per second, median, or None.
        prefill_ratio: As `decode_ratio`.
        memory: Of a process of its own.
    """

    name: str
    kernels: str
    bits: float | None
    packed_bytes: int
    decode: float
    decode_best: float
    decode_ratio: float
    prefill: float | None
    prefill_ratio: float | None
    memory: Memory


def measure_models(options: ModelOptions, progress: Callable[[float, str], None]) -> list[ModelResult]:
    """Time every subject.

    Raises:
        MissingError: ONNX Runtime or the native library is missing.
        UsageError: A file is not a language model of ours.
        CheckFailedError: The process that measures memory failed.
    """
    entries = {"session.force_spinning_stop": "1"} if len(options.subjects) > 1 else None
    models = {
        subject.name: OrtModel(subject.path, threads=options.threads, kernels=subject.kernels, entries=entries)
        for subject in options.subjects
    }
    progress(0.0, "decoding")
    decode = interleave(
        {name: decode_rate(model, options) for name, model in models.items()},
        options.repeats,
        lambda fraction: progress(0.5 * fraction, "decoding"),
    )
    prefill: dict[str, list[float]] = {}
    if options.prefill:
        prefill = interleave(
            {name: prefill_rate(model, options) for name, model in models.items()},
            options.repeats,
            lambda fraction: progress(0.5 + 0.3 * fraction, "prefill"),
        )
    results = []
    last = options.subjects[-1].name
    for index, subject in enumerate(options.subjects):
        progress(0.8 + 0.2 * index / len(options.subjects), "memory")
        model = models[subject.name]
        packed, weights = packed_size(model.file)
        mine = prefill.get(subject.name)
        results.append(
            ModelResult(
                name=subject.name,
                kernels=model.kernels,
                bits=8 * packed / weights if weights else None,
                packed_bytes=packed,
                decode=statistics.median(decode[subject.name]),
                decode_best=max(decode[subject.name]),
                decode_ratio=median_ratio(decode[subject.name], decode[last]),
                prefill=None if mine is None else statistics.median(mine),
                prefill_ratio=None if mine is None else median_ratio(mine, prefill[last]),
                memory=measure_memory(subject, options.threads),
            )
        )
    return results


def packed_size(file: OnnxFile) -> tuple[int, int]:
    """Return the bytes of the constants of all packed layers, each counted once, and the number of their weights."""
    seen: set[str] = set()
    packed = weights = 0
    for node in file.nodes:
        ports = node.ports()
        new = {name for name in ports.values() if name in file.initializers} - seen
        seen |= new
        packed += sum(file.initializers[name].bytes for name in new)
        if ports.get("codes") in new:
            weights += int(node.attributes["out_features"]) * int(node.attributes["in_features"])
    return packed, weights


def decode_rate(model: LanguageModel, options: ModelOptions) -> Callable[[], float]:
    """Return a subject that decodes greedily behind a prompt and gives tokens per second, the prompt not counted."""
    now = clock(options.threads)

    def run() -> float:
        scores = model.start(_tokens(options.prompt))
        start = now()
        for _ in range(options.steps):
            scores = model.step(int(scores.argmax()))
        return options.steps / (now() - start)

    return run


def prefill_rate(model: LanguageModel, options: ModelOptions) -> Callable[[], float]:
    """Return a subject that fills the cache from the tokens of the prefill and gives tokens per second."""
    tokens = _tokens(options.prefill)
    one = seconds(lambda: model.start(tokens), options.threads)
    return lambda: options.prefill / one()


def _tokens(length: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Ids that every vocabulary has; what they say does not matter for time."""
    return np.random.default_rng(0).integers(3, 250, (1, length))


def measure_memory(subject: ModelSubject, threads: int | None) -> Memory:
    """Open the model and decode a few tokens in a fresh process.

    Raises:
        CheckFailedError: The process failed.
    """
    command = [sys.executable, "-m", "rankbook.tools.bench.model_bench", str(subject.path), subject.kernels]
    done = subprocess.run([*command, str(threads or 0)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailedError(f"measuring the memory of {subject.name} failed: {done.stderr.strip()[-500:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _most_resident() -> int:
    """Largest resident memory of this process in bytes; getrusage would count the process that started this one."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise CheckFailedError("/proc/self/status has no VmHWM: memory cannot be measured here")


def _main(arguments: Sequence[str]) -> None:
    """Print the `Memory` of this process as JSON: the other half of `measure_memory`."""
    path, kernels, threads = arguments
    importlib.import_module("onnxruntime")
    find_tokenizer(onnx_file.find_model(Path(path)).parent)  # brings transformers and torch with it
    baseline = _most_resident()
    model = OrtModel(Path(path), threads=int(threads) or None, kernels=kernels)
    scores = model.start(_tokens(16))
    for _ in range(4):
        scores = model.step(int(scores.argmax()))
    print(json.dumps(asdict(Memory(model.file.file_bytes, _most_resident(), baseline))))


if __name__ == "__main__":
    _main(sys.argv[1:])
