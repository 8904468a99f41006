"""What the page was given, put together: a run is a checkpoint, what was exported and built from it, and reports.

Folders belong together where the hashes of the checkpoint's weights are the same, which exports and engines carry.
Reports name models by the path that was typed: one belongs to the folder that this path leads to, from the current
folder or from a folder above the report. What leads nowhere is a run of its own, without a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rankbook.calibration.checkpoint.format import open_checkpoint
from rankbook.calibration.checkpoint.output import LISTING, RESULTS
from rankbook.calibration.source import Kind, identify
from rankbook.exporter.properties import Metadata
from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.engine_parity import EngineParityReport
from rankbook.tools.evaluate.kept import kept
from rankbook.tools.evaluate.parity import ParityReport
from rankbook.tools.inspect.inspection import Inspection, inspect
from rankbook.tools.page.documents import (
    DemoReport,
    DeviceSpeeds,
    Document,
    Evaluation,
    LayerSpeeds,
    ModelSpeeds,
    read,
)

FOLDERS = frozenset({Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE})
"""What a run is made of."""
_DEPTH = 2
"""Levels below a folder that is none of these in which runs and reports are looked for."""
_WANTED = "give checkpoints, exported or engine folders, JSON of eval, parity, bench or the demo, or a folder of them"


@dataclass(frozen=True)
class Part:
    """One folder.

    Attributes:
        kind: One of `FOLDERS`.
        path: As it was given or found.
        found: What it says about itself.
    """

    kind: Kind
    path: Path
    found: Inspection

    @property
    def folder(self) -> Path:
        """The folder that holds it."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def weights(self) -> str:
        """The hashes of the checkpoint's weights, or the folder where they are not known."""
        if self.kind is Kind.CHECKPOINT:
            files = open_checkpoint(self.path).manifest.get("files", {})
            hashes = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
        else:
            facts = self.found.facts
            properties = facts["metadata"] if self.kind is Kind.ONNX else facts["source"]["metadata"]
            hashes = dict(Metadata.of(properties).checkpoint_sha256)
        return json.dumps(hashes, sort_keys=True) if hashes else str(self.folder.resolve())


@dataclass(frozen=True)
class Report:
    """One JSON report.

    Attributes:
        path: The file.
        content: What it holds.
        earlier: Whether it was written before the folder that it is about, as far as the times of files tell.
        others: Names of further runs that the path in it may lead to.
    """

    path: Path
    content: Document
    earlier: bool = False
    others: tuple[str, ...] = ()


@dataclass
class Run:
    """What belongs together.

    Attributes:
        letter: Its short name in figures.
        name: Its name in tables.
        parts: Its folders.
        reports: Reports that are about them.
    """

    letter: str
    name: str
    parts: list[Part] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    def of(self, kind: Kind) -> list[Part]:
        """Return its folders of a kind."""
        return [part for part in self.parts if part.kind is kind]

    @property
    def described(self) -> Inspection | None:
        """The description that says most about layers: that of the checkpoint, or of what came from it."""
        order = (Kind.CHECKPOINT, Kind.ONNX, Kind.ENGINE)
        parts = sorted(self.parts, key=lambda part: order.index(part.kind))
        return next((part.found for part in parts if part.found.layers), None)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Perplexities."""
        return [report.content for report in self.reports if isinstance(report.content, Evaluation)]


@dataclass(frozen=True)
class Collection:
    """Everything that was given.

    Attributes:
        runs: The runs.
        shared: Reports about several models or none: those of `rankbook bench` and of the demo.
        unused: JSON files in folders that were looked through, which are no report.
    """

    runs: list[Run]
    shared: list[Report]
    unused: list[Path]

    def run_of(self, typed: str, report: Path) -> Run | None:
        """Return the run that a path leads to which a report names."""
        return next(iter(self.runs_of(typed, report)), None)

    def runs_of(self, typed: str, report: Path) -> list[Run]:
        """Return every run that it may lead to, the nearest first: the current folder may be another than then."""
        folders = {part.folder.resolve(): run for run in self.runs for part in run.parts}
        found = {id(folders[place]): folders[place] for place in _places(typed, report) if place in folders}
        return list(found.values())


def collect(paths: Iterable[Path]) -> Collection:
    """Read everything that lies at ``paths``.

    Raises:
        UsageError: A path is none of what the page is made of, or damaged.
        SchemaError: A report is damaged.
    """
    parts: dict[Path, Part] = {}
    documents: dict[Path, Document] = {}
    unused: list[Path] = []
    for path in dict.fromkeys(paths):
        found = list(_look(path, _DEPTH))
        if not found:
            raise UsageError(f"{path} holds no run and no report; {_WANTED}")
        for item in found:
            if isinstance(item, Part):
                parts.setdefault(item.folder.resolve(), item)
            elif (content := read(item)) is not None:
                documents.setdefault(item.resolve(), content)
            elif item == path:
                raise UsageError(f"{path} is JSON, but no report of eval, parity, bench or the demo; {_WANTED}")
            else:
                unused.append(item)
    runs = _runs(parts.values())
    for run in runs:
        for part in run.parts:
            run.reports += [Report(part.folder / RESULTS, content) for content in kept(part.folder)]
    held = Collection(runs, [], unused)
    shared = [report for path, content in documents.items() if (report := _placed(path, content, held)) is not None]
    for index, run in enumerate(runs):
        run.letter = _letter(index)
    return Collection(runs, shared, unused)


def _look(path: Path, depth: int) -> Iterator[Part | Path]:
    """Yield the folders of runs, and the JSON files, at a path or below."""
    if path.is_file() and path.suffix == ".json":
        yield path
        return
    try:
        kind = identify(path, FOLDERS).kind
    except ValueError as error:
        if not path.is_dir():
            raise UsageError(f"{error}, or JSON of eval, parity, bench or the demo") from None
    else:
        yield Part(kind, path, inspect(path, verify=False))
        return
    for inner in sorted(path.iterdir()):
        wanted = inner.suffix == ".json" if inner.is_file() else inner.is_dir() and depth > 1
        if wanted and not inner.name.startswith(".") and inner.name not in (LISTING, RESULTS):
            yield from _look(inner, depth - 1)


def _runs(parts: Iterable[Part]) -> list[Run]:
    found: dict[str, Run] = {}
    for part in parts:
        found.setdefault(part.weights, Run("", str(part.path))).parts.append(part)
    return list(found.values())


def _placed(path: Path, content: Document, held: Collection) -> Report | None:
    """Give a report to its run, which is made where there is none; return one that is about several models."""
    if isinstance(content, (ModelSpeeds, LayerSpeeds, DeviceSpeeds, DemoReport)):
        return Report(path, content)
    typed = content.engine if isinstance(content, EngineParityReport) else content.model
    found = held.runs_of(typed, path)
    if not found and isinstance(content, (ParityReport, EngineParityReport)):
        other = content.model if isinstance(content, EngineParityReport) else content.checkpoint
        found = held.runs_of(other, path)
    run = next(iter(found), None)
    if run is None:
        run = next((item for item in held.runs if not item.parts and item.name == typed), None)
    if run is None:
        run = Run("", typed)
        held.runs.append(run)
    run.reports.append(Report(path, content, _earlier(path, run), tuple(other.name for other in found[1:])))
    return None


def _earlier(path: Path, run: Run) -> bool:
    """Return whether a report is older than the newest weights of its run."""
    marks = [file for part in run.parts for file in part.folder.glob("*.safetensors")]
    return any(file.stat().st_mtime > path.stat().st_mtime for file in marks)


def _places(typed: str, report: Path) -> Iterator[Path]:
    """Yield the folders that a typed path may mean."""
    for base in (Path.cwd(), *report.resolve().parents):
        place = (base / typed).resolve()
        yield place.parent if place.suffix in (".onnx", ".engine") else place


def _letter(index: int) -> str:
    """A, B, ..., Z, AA, ..."""
    return ("" if index < 26 else _letter(index // 26 - 1)) + chr(ord("A") + index % 26)
