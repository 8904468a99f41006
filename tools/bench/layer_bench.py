"""Times single layers in interleaved turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankbook.tools.bench.layers import LayerSubject
from rankbook.tools.bench.options import LayerOptions
from rankbook.tools.bench.timing import interleave, median_ratio, seconds
from rankbook.tools.runtimes.ort import NO_FALLBACK, session


@dataclass(frozen=True)
class LayerRace:
    """The kinds of layers, and how they are measured.

    Attributes:
        subjects: The kinds.
        options: Sizes and turns.
        threads: Thread counts.
        cuda: Run on ONNX Runtime's CUDA provider, nothing on the CPU; the clock is the wall's.
    """

    subjects: tuple[LayerSubject, ...]
    options: LayerOptions
    threads: tuple[int, ...]
    cuda: bool = False


@dataclass(frozen=True)
class LayerResult:
    """One kind of layer at one size.

    Attributes:
        name: The subject.
        bits: Bits per code.
        out_features: N.
        in_features: K.
        tokens: Rows of x.
        threads: Threads.
        microseconds: Median time of one layer.
        fastest: Shortest time of one layer, microseconds.
        bytes: Constants of one layer.
        gigabytes_per_second: Constants read per second at the median.
        peer: The peer that ``ratio`` compares with, or None.
        ratio: Median over turns of (the peer's time / this time), or None.
    """

    name: str
    bits: int
    out_features: int
    in_features: int
    tokens: int
    threads: int
    microseconds: float
    fastest: float
    bytes: int
    gigabytes_per_second: float
    peer: str | None
    ratio: float | None


def measure_layers(race: LayerRace, progress: Callable[[float, str], None]) -> list[LayerResult]:
    """Time every subject at every shape, number of tokens and threads.

    Raises:
        MissingError: ONNX Runtime or the native library is missing.
        UsageError: A shape does not fit a subject.
    """
    cells = [(shape, threads) for shape in race.options.sizes for threads in race.threads]
    results: list[LayerResult] = []
    for index, (shape, threads) in enumerate(cells):
        name = f"{shape[0]} x {shape[1]}, {threads} threads"

        def show(fraction: float, index: int = index, name: str = name) -> None:
            progress((index + fraction) / len(cells), name)

        show(0.0)
        results += _measure_cell(race, shape, threads, show)
    return results


def _measure_cell(
    race: LayerRace, shape: tuple[int, int], threads: int, show: Callable[[float], None]
) -> list[LayerResult]:
    opened: dict[str, tuple[LayerSubject, Any, int, int]] = {}
    for subject in race.subjects:
        model, copies, size = subject.model(shape, race.options.stream_bytes)
        # Workers of one session must not spin while another one is timed.
        entries = {"session.force_spinning_stop": "1"}
        held = session(
            model.SerializeToString(),
            threads=threads,
            native=subject.native,
            cuda=race.cuda,
            activations=subject.activations,
            entries=entries | ({NO_FALLBACK: "1"} if race.cuda else {}),
        )
        opened[subject.name] = (subject, held, copies, size)
    results = []
    for step, tokens in enumerate(race.options.tokens):
        x = np.random.default_rng(0).standard_normal((tokens, shape[1])).astype(np.float32)
        runs = {
            # A thread that waits for the GPU spends no time of its own. `run` returns when the result is back.
            name: seconds(_call(held, x.astype(subject.dtype)), None if race.cuda else threads)
            for name, (subject, held, _, _) in opened.items()
        }

        def part(fraction: float, step: int = step) -> None:
            show((step + fraction) / len(race.options.tokens))

        times = interleave(runs, race.options.repeats, part)
        per_layer = {name: [value / opened[name][2] for value in values] for name, values in times.items()}
        for subject, _, _, size in opened.values():
            results.append(_result(subject, shape, (tokens, threads), size, per_layer, [*opened]))
    return results


def _call(held: Any, x: np.ndarray[Any, Any]) -> Callable[[], object]:
    return lambda: held.run(None, {"x": x})


def _result(
    subject: LayerSubject,
    shape: tuple[int, int],
    cell: tuple[int, int],
    size: int,
    times: dict[str, list[float]],
    names: Sequence[str],
) -> LayerResult:
    mine = times[subject.name]
    middle = statistics.median(mine)
    peer = peer_of(subject, names)
    return LayerResult(
        name=subject.name,
        bits=subject.bits,
        out_features=shape[0],
        in_features=shape[1],
        tokens=cell[0],
        threads=cell[1],
        microseconds=middle * 1e6,
        fastest=min(mine) * 1e6,
        bytes=size,
        gigabytes_per_second=size / middle / 1e9,
        peer=peer,
        ratio=None if peer is None else median_ratio(times[peer], mine),
    )


def peer_of(subject: LayerSubject, names: Sequence[str]) -> str | None:
    """Return what a layer of rankbook is compared with: MatMulNBits of its width, or of 4 bits where it has none."""
    if not subject.native:
        return None
    wanted = (f"MatMulNBits {subject.bits} bits", "MatMulNBits 4 bits", "MatMul fp32")
    return next((name for name in wanted if name in names), None)
