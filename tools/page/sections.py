"""The sections of the page: each takes the runs and says what they hold, and of what they lack, how to get it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankbook.calibration.source import Kind
from rankbook.tools.page import figures, layers
from rankbook.tools.page.documents import Evaluation, TaskScores
from rankbook.tools.page.runs import Collection, Part, Run
from rankbook.tools.report import Table, megabytes

_KINDS = {Kind.CHECKPOINT: "checkpoint", Kind.ONNX: "ONNX file", Kind.ENGINE: "engine"}
MOST_KINDS = 12
"""Kinds of layers in one picture; those with the fewest layers are left out and named."""


@dataclass(frozen=True)
class Figure:
    """A picture with a line below; ``svg`` is markup, everything else text."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Bar:
    """A bar of one part or several: (label, value, colour of the part) and what is written behind it."""

    label: str
    parts: Sequence[tuple[str, float, int]]
    text: str


@dataclass(frozen=True)
class Bars:
    """Bars on one scale; with a legend if they have several parts."""

    title: str
    bars: Sequence[Bar]

    @property
    def longest(self) -> float:
        """Sum of the parts of the longest bar."""
        return max((sum(value for _, value, _ in bar.parts) for bar in self.bars), default=0) or 1

    @property
    def legend(self) -> dict[str, int]:
        """Colour by name of a part; empty where no bar has several."""
        named = {label: colour for bar in self.bars for label, _, colour in bar.parts}
        return named if any(len(bar.parts) > 1 for bar in self.bars) else {}


@dataclass(frozen=True)
class Code:
    """Lines to type or to read; long ones are folded away under their title."""

    title: str
    text: str
    folded: bool = False


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        about: One sentence on what is shown.
        blocks: What is shown.
        missing: What is not, with the reason.
    """

    title: str
    about: str
    blocks: list[Table | Figure | Bars | Code] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """For links within the page."""
        return "-".join(self.title.lower().split())


def overview(given: Collection) -> Section:
    """One line for each run."""
    section = Section("Overview", "What was given, put together by the hashes of the checkpoint's weights.")
    rows = []
    for run in given.runs:
        first = run.evaluations[:1]
        measured = [(item.on, _shown(item.perplexity), *_compared(item)[:2]) for item in first] or [(None,) * 4]
        rows.append(
            (
                *(run.letter, run.name, _what(run), bits(run), *measured[0]),
                ", ".join(f"{_KINDS[kind]} {megabytes(_size(part))}" for kind in _KINDS for part in run.of(kind)),
            )
        )
        section.missing += [f"{run.letter}: no {_KINDS[kind]} was given" for kind in _KINDS if not run.of(kind)]
        section.missing += [
            f"{run.letter}: {report.path} was written before the weights of {run.name}, and may be about earlier ones"
            for report in run.reports
            if report.earlier
        ]
        section.missing += [
            f"{run.letter}: {report.path} is taken for one about {run.name}; the path in it may also mean"
            f" {', '.join(report.others)}"
            for report in run.reports
            if report.others
        ]
    known = ("run", "name", "what", "stored bits per weight", "evaluated on", "perplexity", "unquantized", "KL, nats")
    section.blocks.append(Table("", (*known, "sizes"), rows))
    section.missing += [f"{path} was passed over: it is no report" for path in given.unused]
    return section


def bits(run: Run) -> float | None:
    """Return the stored bits per weight of a run's quantized layers, if they are known."""
    return run.described.bits_per_weight if run.described else None


def _what(run: Run) -> str:
    """Say how the layers of a run were quantized; several kinds by how many layers have them."""
    if run.described is None:
        return "not described by what was given"
    counts: dict[str, int] = {}
    for layer in run.described.layers:
        rank = f", rank {layer.planes}" if layer.planes else ""
        group = f", groups of {layer.group}" if layer.group else ""
        branch = f", error branch of rank {layer.error_rank}" if layer.error_rank else ""
        kind = f"{layer.method} {layer.bits} bits{rank}{group}{branch}"
        counts[kind] = counts.get(kind, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{kind} ({count} layers)" for kind, count in ranked[:3]]
    return "; ".join([*shown, *([f"and {len(ranked) - 3} other kinds"] if len(ranked) > 3 else [])])


def _size(part: Part) -> int:
    facts = part.found.facts
    if part.kind is Kind.CHECKPOINT:
        return sum(file.stat().st_size for file in part.folder.glob("*.safetensors"))
    return int(facts["file_bytes" if part.kind is Kind.ONNX else "engine_bytes"])


def accuracy(given: Collection) -> Section:
    """Perplexity against stored bits, for each text apart, and scores of tasks."""
    section = Section(
        "Accuracy",
        "Perplexity against stored bits, side data included. Values are comparable only on the same text and windows.",
    )
    texts: dict[str, list[tuple[Run, Evaluation]]] = {}
    for run in given.runs:
        for found in run.evaluations:
            texts.setdefault(found.on, []).append((run, found))
    for on, results in texts.items():
        section.blocks += _perplexities(on, results)
        section.missing += _mixed(on, [result for _, result in results])
    rows = [row for run in given.runs for report in run.reports for row in _scores(run.letter, report.content)]
    if rows:
        columns = ("run", "runtime", "task", "metric", "value")
        section.blocks.append(Table("Tasks of lm-evaluation-harness", columns, rows))
    section.missing += [
        f"{run.letter}: no evaluation; `rankbook eval {run.name} --text FILE --json > eval.json` makes one"
        for run in given.runs
        if not any(isinstance(report.content, (Evaluation, TaskScores)) for report in run.reports)
    ]
    section.missing += [
        f"{run.letter} is not in the picture: its stored bits are not known without its folder"
        for run in given.runs
        if run.evaluations and bits(run) is None
    ]
    return section


def _perplexities(on: str, found: Sequence[tuple[Run, Evaluation]]) -> Iterator[Table | Figure]:
    points: dict[str, list[tuple[float, float]]] = {}
    for run, result in found:
        if (stored := bits(run)) is not None and math.isfinite(result.perplexity) and result.perplexity > 0:
            points.setdefault(run.letter, []).append((stored, result.perplexity))
    if points:
        picture = figures.accuracy(points, _bases(result for _, result in found))
        yield Figure(picture, f"On {on}. Lower and further left is better.")
    rows = [(run.letter, r.model, r.runtime, bits(run), _shown(r.perplexity), *_compared(r)) for run, r in found]
    names = ("run", "model", "runtime", "stored bits", "perplexity", "unquantized", "KL, nats", "same likeliest token")
    yield Table(f"On {on}", names, rows)


def _compared(result: Evaluation) -> tuple[object, ...]:
    """Return the cells of a comparison with the unquantized model."""
    return _shown(result.reference_perplexity), _shown(result.kl), share(result.top1_agreement)


def _bases(found: Iterable[Evaluation]) -> list[float]:
    """Return the perplexities of unquantized models, those that are the same in four digits once."""
    known = [result.reference_perplexity for result in found if result.reference_perplexity is not None]
    return sorted({float(f"{value:.4g}") for value in known if math.isfinite(value)})


def _mixed(on: str, found: Sequence[Evaluation]) -> Iterator[str]:
    """Say where results that stand side by side may not belong there."""
    if len(texts := sorted({result.text for result in found if result.text})) > 1:
        yield f"on {on}: {', '.join(texts)} are taken for one text, by their name"
    if len(bases := _bases(found)) > 1:
        values = ", ".join(f"{value:g}" for value in bases)
        yield f"on {on}: the unquantized models have perplexities of {values}, so that the runs are of several models"


def _shown(value: float | None) -> float | str | None:
    return "not finite" if value is not None and not math.isfinite(value) else value


def share(value: float | None) -> str | None:
    """Format a share, 0 to 1, in percent."""
    return None if value is None else f"{100 * value:.1f} %"


def _scores(letter: str, found: object) -> Iterator[tuple[Any, ...]]:
    if isinstance(found, TaskScores):
        for task, metrics in found.tasks.items():
            for metric, value in metrics.items():
                if isinstance(value, (int, float)):
                    yield letter, found.runtime, task, metric.removesuffix(",none"), value


def errors(given: Collection) -> Section:
    """Errors of layers over the depth."""
    section = Section(
        "Error of each layer",
        "Squared output error on calibration data, relative to the squared output. Dashed: without the error branch.",
    )
    for run, part, _ in _checkpoints(given, section):
        found = layers.errors(part)
        if not found:
            section.missing.append(f"{run.letter}: its checkpoint has no errors of layers; quantize again to have them")
            continue
        kinds = layers.by_depth(found)
        shown = dict(list(kinds.items())[:MOST_KINDS])
        section.blocks.append(Figure(figures.layer_errors(shown), f"{run.letter}: {len(found)} layers of {run.name}"))
        if left := list(kinds)[MOST_KINDS:]:
            section.missing.append(f"{run.letter}: not in the picture are {', '.join(left)}")
        if _has_branch(part) and not any(item.bare is not None for item in found):
            section.missing.append(
                f"{run.letter}: the errors without the branch are not in its checkpoint, which an older version wrote"
            )
        worst = sorted(found, key=lambda item: -(item.error or 0))[:5]
        rows = [(item.name, item.error, item.bare) for item in worst]
        section.blocks.append(Table(f"{run.letter}: largest", ("layer", "error", "without the branch"), rows))
    return section


def _has_branch(part: Part) -> bool:
    return any(layer.error_rank for layer in part.found.layers)


def _checkpoints(given: Collection, section: Section) -> Iterator[tuple[Run, Part, Any]]:
    """Yield the runs with a checkpoint, which is opened; the others are named."""
    from rankbook.calibration.checkpoint.format import open_checkpoint

    for run in given.runs:
        if parts := run.of(Kind.CHECKPOINT):
            yield run, parts[0], open_checkpoint(parts[0].path)
        else:
            section.missing.append(f"{run.letter}: no checkpoint was given")


def close_looks(given: Collection, count: int) -> list[Section]:
    """Spectra of errors, and codebooks, of some layers of each checkpoint."""
    spectra = Section(
        "Spectrum of the error",
        "Singular values of the difference between a weight and what is stored of it. What a branch of a rank can take"
        " away lies left of that rank.",
    )
    books = Section("Codebooks", "Each line of the left picture is the codebook of one group; by growing width.")
    for run, part, opened in _checkpoints(given, spectra):
        names = layers.chosen(layers.errors(part), [item.name for item in part.found.layers if item.group], count)
        source = layers.SourceWeights(opened.manifest)
        reasons: dict[str, list[str]] = {}
        for name in names:
            weight = source.weight(name)
            if isinstance(weight, str):
                reasons.setdefault(weight, []).append(name)
            found = layers.spectrum(opened, name, None if isinstance(weight, str) else weight)
            if found.codes or found.branch:
                caption = f"{run.letter}: {name}" + (": the branch alone" if found.codes is None else "")
                spectra.blocks.append(Figure(figures.error_spectrum(found), caption))
            picture = figures.codebook_picture(layers.codebooks(opened, name))
            books.blocks.append(Figure(picture, f"{run.letter}: {name}"))
        spectra.missing += [
            f"{run.letter}: no spectrum of the error: {why} ({', '.join(n)})" for why, n in reasons.items()
        ]
    books.missing += [line for line in spectra.missing if line.endswith("no checkpoint was given")]
    return [spectra, books]


def sizes(given: Collection) -> Section:
    """Where the bytes of each folder go."""
    section = Section("Where the bytes go", "Files of weights, by what they hold.")
    held = [
        (f"{run.letter}: {_KINDS[part.kind]} {part.path}", layers.bytes_of(part))
        for run in given.runs
        for part in run.parts
    ]
    names = list(dict.fromkeys(name for _, parts in held for name in parts))
    bars = [
        Bar(label, [(name, size, names.index(name)) for name, size in parts.items()], megabytes(sum(parts.values())))
        for label, parts in held
    ]
    rows = [(label, *(megabytes(parts[name]) if name in parts else None for name in names)) for label, parts in held]
    section.blocks += [Bars("", bars), Table("", ("folder", *names), rows)] if held else []
    section.missing += [f"{run.letter}: no folder was given" for run in given.runs if not run.parts]
    return section
