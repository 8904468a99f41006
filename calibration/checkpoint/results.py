"""What a checkpoint or an exported folder keeps of its evaluations: rankbook-evaluation.json, a table in its card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankbook.calibration.checkpoint.card import CARD, put_results
from rankbook.calibration.checkpoint.files import describe_file, write_text_atomic
from rankbook.calibration.checkpoint.output import RESULTS, add_to_listing, locked
from rankbook.calibration.schema import SchemaError, read_object
from rankbook.calibration.source import MANIFEST

FORMAT_VERSION = 1
"""Version of rankbook-evaluation.json."""
CHECKPOINT = "checkpoint"
"""What an exported folder names as the model of the results that its checkpoint had."""
_ADVICE = "evaluate again with --card, or remove the file"
_VALUES = frozenset({"perplexity", "kl", "top1_agreement", "seconds", "reference_perplexity", "date", "versions"})
"""Entries of a result that are not conditions under which it was measured; so are those of ``tasks``."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return what a folder keeps, in the order of measuring; nothing where it keeps nothing.

    Each is what ``rankbook eval --json`` prints, with names in place of paths, a date and versions.

    Raises:
        SchemaError: The file is damaged, or of another version.
    """
    path = folder / RESULTS
    if not path.is_file():
        return []
    content = read_object(path, _ADVICE)
    if (version := content.get("format_version")) != FORMAT_VERSION:
        raise SchemaError(f"{path} has format version {version!r}; this rankbook reads {FORMAT_VERSION}: {_ADVICE}")
    results = content.get("results")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise SchemaError(f"'results' in {path} is no list of objects; {_ADVICE}")
    return results


def keep_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep a result in a folder that a run of this project wrote; it replaces one that was measured in the same way.

    The list of the folder's files, and a checkpoint's manifest, follow.

    Args:
        folder: A checkpoint or an exported folder.
        result: Finite values, text and containers of them.

    Raises:
        SchemaError: What the folder keeps is damaged.
        OSError: The folder cannot be written, or another run writes there.
    """
    with locked(folder) as folder:
        others = [other for other in read_results(folder) if _conditions(other) != _conditions(result)]
        write_results(folder, [*others, result])
        put_results(folder, [*others, result])
        add_to_listing(folder, (RESULTS, CARD))
        if (folder / MANIFEST).is_file():
            manifest = read_object(folder / MANIFEST, "write the checkpoint again")
            manifest.setdefault("files", {}).update({name: describe_file(folder / name) for name in (RESULTS, CARD)})
            write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def carry_results(source: Path, folder: Path) -> None:
    """Keep in a folder that is being written what its checkpoint keeps, as the checkpoint's."""
    if results := [{**result, "model": CHECKPOINT} for result in read_results(source)]:
        write_results(folder, results)
        put_results(folder, results)


def write_results(folder: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Write the file of results."""
    content = {"format_version": FORMAT_VERSION, "results": list(results)}
    write_text_atomic(folder / RESULTS, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return under what a result was measured: all that is no value."""
    return {name: value for name, value in result.items() if name not in _VALUES and name != "tasks"}
