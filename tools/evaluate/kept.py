"""Results of ``rankbook eval --card``, as the folder of the evaluated model keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.checkpoint.output import LISTING, RESULTS
from rankbook.calibration.source import Kind, identify
from rankbook.tools.errors import UsageError

if TYPE_CHECKING:
    from rankbook.tools.page.documents import Evaluation, TaskScores

FOLDER = "FOLDER"
"""What stands for the folder in the commands of its card."""


def folder_of(model: str) -> Path:
    """Return the folder that can keep results of a model; to be asked before the model runs.

    Raises:
        UsageError: It is no checkpoint or exported folder that this project wrote, or cannot be written.
    """
    try:
        folder = Path(identify(model, frozenset({Kind.CHECKPOINT, Kind.ONNX})).location)
    except ValueError as error:
        raise UsageError(f"--card is for what has a model card: {error}") from None
    if not (folder / LISTING).is_file():
        raise UsageError(f"--card: {folder} has no {LISTING}, so rankbook did not write it; leave --card out")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--card: {folder} cannot be written; copy the folder, or leave --card out")
    return folder


def keep(folder: Path, report: Mapping[str, Any]) -> None:
    """Keep what ``eval --json`` prints in a folder and in its card, with names in place of paths.

    Raises:
        ValueError: What the folder keeps already is damaged.
        OSError: The folder cannot be written.
    """
    from rankbook.calibration.checkpoint.files import sha256_file
    from rankbook.calibration.checkpoint.results import keep_result
    from rankbook.calibration.versions import versions
    from rankbook.tools.page.documents import Evaluation, TaskScores, make
    from rankbook.tools.report import plain

    kind: type[Evaluation | TaskScores] = TaskScores if "tasks" in report else Evaluation
    named = _without_paths(plain(report))
    result: Evaluation | TaskScores = make(kind, {**named, "model": FOLDER}, "the result")
    text = report.get("text")
    keep_result(
        folder,
        {
            **named,
            "model": ".",
            **({"text_sha256": sha256_file(Path(text))} if text and Path(text).is_file() else {}),
            **{"on": result.on, "runtime": result.runtime, "command": result.command},
            "date": datetime.now(timezone.utc).date().isoformat(),
            "versions": versions("onnxruntime"),
        },
    )


def kept(folder: Path) -> Iterator[Evaluation | TaskScores]:
    """Yield what a folder keeps, for a page.

    Raises:
        SchemaError: It is damaged.
    """
    from rankbook.calibration.checkpoint.results import CHECKPOINT, read_results
    from rankbook.tools.page.documents import Evaluation, TaskScores, make

    for result in read_results(folder):
        kind: type[Evaluation | TaskScores] = TaskScores if "tasks" in result else Evaluation
        found: Evaluation | TaskScores = make(kind, result, str(folder / RESULTS))
        if found.model != CHECKPOINT:
            yield replace(found, model=str(folder))


def _without_paths(value: Any) -> Any:
    """Return a report in which the name of a file or folder stands for its path: cards are read by others."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, str) and ("/" in value or "\\" in value) and Path(value).exists():
        return Path(value).name
    return value
