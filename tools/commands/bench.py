"""``rankbook bench``: how fast single layers or whole exported models are, beside their peers."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.files import write_text_atomic
from rankbook.calibration.option import argument, option
from rankbook.tools.bench.options import DeviceOptions, LayerOptions
from rankbook.tools.command import Command, Common, Outcome
from rankbook.tools.console import Console
from rankbook.tools.errors import UsageError
from rankbook.tools.kernel_options import KernelOptions
from rankbook.tools.report import Table, to_json

if TYPE_CHECKING:
    from rankbook.tools.bench.layer_bench import LayerResult
    from rankbook.tools.bench.layers import LayerSubject
    from rankbook.tools.bench.model_bench import ModelResult

LAYER_PEERS = ("matmulnbits", "fp32", "none")
CUDA_PEER_BITS = (4, 8)
"""Widths of ONNX Runtime's MatMulNBits on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Bench(DeviceOptions, LayerOptions, KernelOptions, Common):
    """Options of the verb: those of models and of single layers, and what to compare."""

    models: tuple[str, ...] = argument(
        "exported folders or .onnx files, MODEL@KERNELS to choose kernels, MODEL@genai for ONNX Runtime GenAI; engine"
        " folders with --device cuda; default: single layers",
        default=(),
        metavar="MODEL",
    )
    device: str = option(
        "cpu",
        "cuda runs everything on an NVIDIA GPU, models with --kernels native-cuda, layers with x in fp16",
        choices=("cpu", "cuda"),
    )
    peers: tuple[str, ...] = option(
        (),
        "what to compare with; layers: matmulnbits (the default), fp32 or none; models: genai=DIR,"
        " llamacpp=FILE.gguf, matmulnbits=DIR",
        metavar="PEER",
    )
    output: Path | None = option(
        None, "write bench.json, bench.md and, for models, bench.png", metavar="DIR", flags=("-o", "--output")
    )


def run(options: Bench) -> Outcome:
    """Measure, report, store."""
    from rankbook.tools.bench import plot
    from rankbook.tools.runtimes import runtimes

    if options.models and options.device == "cuda":
        return _device(options)
    runtimes()["bodies"].require()
    if cuda := _kernels(options) == "native-cuda":
        runtimes()["native-cuda"].require()
    report: dict[str, Any] = {"machine": _machine("ort-cuda" if cuda else "ort")}
    if options.models:
        table, report["models"] = _models(options)
    else:
        table, report["layers"] = _layers(options)
    report["bandwidth"] = {} if cuda else _bandwidth(options)
    lines = [
        f"plain read from memory, {threads} threads: {rate / 1e9:.1f} GB/s"
        for threads, rate in report["bandwidth"].items()
    ]
    if options.output:
        draw = partial(plot.draw, report["models"]) if "models" in report else None
        lines += _store(options.output, report, [table], lines, draw)
    return Outcome(report, [table], "\n".join(lines))


def _device(options: Bench) -> Outcome:
    """Measure models on a GPU."""
    from rankbook.tools.bench import device_report as shown
    from rankbook.tools.bench.device_bench import DeviceRace
    from rankbook.tools.bench.subject import ModelSubject

    _check_peers(options, _kernels(options))
    subjects = list(dict.fromkeys(map(ModelSubject.on_device, options.models)))
    watch, instruments = shown.instruments()
    with Console(quiet=options.quiet).progress("models") as progress:
        found = DeviceRace(options, instruments).run(subjects, progress)
    report = {"machine": {**_cpu(), **watch()}, "copy_bandwidth": instruments.copy, **vars(found)}
    lines = [f"not measured: {item.name}: {item.reason}" for item in found.missing]
    if instruments.copy:
        lines.insert(0, f"plain copy within device memory: {instruments.copy / 1e9:.0f} GB/s")
    tables = shown.tables(found)
    if options.output:
        lines += _store(options.output, report, tables, lines, lambda path: shown.draw(found, path))
    return Outcome(report, tables, "\n".join(lines))


def _kernels(options: Bench) -> str:
    """Return the name of a runtime, with ``--device`` taken into account."""
    kernels = options.chosen_kernels()
    if options.device == "cpu":
        return kernels
    if kernels not in ("auto", "native-cuda"):
        raise UsageError(f"--device cuda and kernels {kernels} contradict each other; leave one of them out")
    return "native-cuda"


def _threads(options: Bench) -> tuple[int, ...]:
    """The given number, or one and all of those this process may run on; one beside a GPU."""
    if options.threads or _kernels(options) == "native-cuda":
        return (options.threads or 1,)
    return tuple(sorted({1, len(os.sched_getaffinity(0))}))


def _cpu() -> dict[str, Any]:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def _machine(runtime: str) -> dict[str, Any]:
    import onnxruntime

    from rankbook.plugins.library import native_info, unavailable

    return {
        **_cpu(),
        "clock": "one thread: its own time; more, or a GPU: wall",
        "onnxruntime": onnxruntime.__version__,
        "native": None if unavailable(runtime) else native_info(runtime),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text("utf-8").splitlines() if file.is_file() else []


def _bandwidth(options: Bench) -> dict[int, float]:
    from rankbook.tools.bench.bandwidth import read_bandwidth

    return {threads: read_bandwidth(threads) for threads in _threads(options)}


def _layers(options: Bench) -> tuple[Table, list[LayerResult]]:
    from rankbook.tools.bench.layer_bench import LayerRace, measure_layers

    race = LayerRace(tuple(_subjects(options)), options, _threads(options), _kernels(options) == "native-cuda")
    with Console(quiet=options.quiet).progress("layers") as progress:
        results = measure_layers(race, progress)
    rows = [
        (
            item.name,
            f"{item.out_features} x {item.in_features}",
            item.tokens,
            item.threads,
            item.microseconds,
            item.gigabytes_per_second,
            item.peer,
            item.ratio,
        )
        for item in results
    ]
    columns = ("layer", "N x K", "tokens", "threads", "µs", "GB/s", "peer", "times as fast")
    return Table("single layers, medians", columns, rows), results


def _subjects(options: Bench) -> list[LayerSubject]:
    from rankbook.tools.bench.layers import matmul_nbits, packed_matmul, plain_float
    from rankbook.tools.runtimes import runtimes

    kernels = _kernels(options)
    if kernels == "bodies":
        raise UsageError("single layers measure the native library; give an exported model to measure the bodies")
    cuda = kernels == "native-cuda"
    runtimes()["native-cuda" if cuda else "native"].require()
    peers = options.peers or LAYER_PEERS[:1]
    if not set(peers) <= set(LAYER_PEERS):
        raise UsageError(f"--peers {' '.join(peers)}: beside single layers choose from {', '.join(LAYER_PEERS)}")
    kinds = ["int8", "fp32"] if options.exact or cuda else ["fp32"] if kernels == "native" else ["int8"]
    subjects = [
        packed_matmul(bits, rank, branch=branch, group=options.group_size, activations=kind, gpu=cuda)
        for bits in options.bits
        for rank in options.ranks
        for branch in sorted({0, options.branch})
        for kind in kinds
    ]
    if "matmulnbits" in peers:
        widths, dtype = (CUDA_PEER_BITS, "float16") if cuda else ((2, 4, 8), "float32")
        subjects += [matmul_nbits(bits, dtype) for bits in widths if bits == 4 or bits in options.bits]
    return [*subjects, plain_float()] if "fp32" in peers else subjects


def _models(options: Bench) -> tuple[Table, list[ModelResult]]:
    from rankbook.tools.bench.model_bench import ModelRace, measure_models
    from rankbook.tools.bench.subject import ModelSubject

    kernels = _kernels(options)
    _check_peers(options, kernels)
    subjects = [ModelSubject.parse(text, kernels) for text in options.models]
    if engines := [str(subject.path) for subject in subjects if subject.is_engine]:
        raise UsageError(f"{' and '.join(engines)}: engines are measured on a GPU; give --device cuda")
    subjects += [ModelSubject.parse_peer(text) for text in options.peers]
    race = ModelRace(tuple(dict.fromkeys(subjects)), options)
    with Console(quiet=options.quiet).progress("models") as progress:
        results = measure_models(race, progress)
    return _model_table(results, race.references), results


def _check_peers(options: Bench, kernels: str) -> None:
    if options.peers and kernels == "native-cuda":
        raise UsageError(
            f"--peers {' '.join(options.peers)}: beside models these run on the CPU; on a GPU give the folder of"
            " `rankbook export --dialect ort` as another MODEL, which runs MatMulNBits there"
        )


def _model_table(results: list[ModelResult], references: tuple[str, ...]) -> Table:
    """One row for each model; ratios to each reference, which a number names: its place among them."""
    rows = [
        (
            item.name,
            item.kernels,
            item.bits,
            item.decode,
            *(item.decode_ratios.get(name) for name in references),
            item.prefill,
            *(item.prefill_ratios.get(name) for name in references),
            item.memory.file_bytes / 1e6,
            (item.memory.peak_rss - item.memory.baseline_rss) / 1e6,
            item.memory.ratio,
        )
        for item in results
    ]
    short = [f"to {name.partition('=')[0] if '=' in name else 'the last'}" for name in references]
    short = [
        f"{text} {short[:index].count(text) + 1}" if short.count(text) > 1 else text for index, text in enumerate(short)
    ]
    ratios = tuple(short)
    columns = ("model", "kernels", "stored bits", "decode, tokens/s", *ratios, "prefill, tokens/s", *ratios)
    return Table("models, medians", (*columns, "file, MB", "RSS beyond Python, MB", "to the file"), rows)


def _store(
    folder: Path,
    report: dict[str, Any],
    tables: Sequence[Table],
    lines: list[str],
    draw: Callable[[Path], None] | None,
) -> list[str]:
    """Write the files; returns what to say about them."""
    from rankbook.tools.bench import plot

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "bench.json", to_json(report) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    write_text_atomic(folder / "bench.md", "\n\n".join([machine, *(t.markdown() for t in tables), *lines]) + "\n")
    if draw is None:
        return [f"stored in {folder}"]
    if reason := plot.unavailable():
        return [f"stored in {folder}, without a plot: {reason}"]
    draw(folder / "bench.png")
    return [f"stored in {folder}"]


COMMAND = Command(
    name="bench",
    summary="measure the speed of single layers or whole models, also against other runtimes",
    example="rankbook bench model-onnx@native-int8 --peers genai=genai-int4 llamacpp=model.gguf -o bench",
    options=Bench,
    run=run,
)
