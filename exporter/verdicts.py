"""What could be exported before, kept in the user's cache folder, because tracing two blocks takes seconds.

Only success is kept, as an empty file whose name is a hash of everything that it depends on. A refusal is found again
each time: its reason may have been the moment (too little memory), and such runs are rare.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rankbook
from rankbook.calibration.model.custom_code import is_trusted

VARIABLE = "RANKBOOK_CACHE"
"""Names the cache folder; empty where nothing is to be kept."""


def known(config: Any, text: str) -> bool:
    """Return whether a model was exported before by the same code.

    Args:
        config: Its transformers configuration.
        text: The same as text.
    """
    mark = _mark(config, text)
    with contextlib.suppress(OSError):  # a folder that may not be read
        return mark is not None and mark.is_file()
    return False


def keep(config: Any, text: str) -> None:
    """Note that a model can be exported, where the cache can be written."""
    if (mark := _mark(config, text)) is not None:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _mark(config: Any, text: str) -> Path | None:
    """Return the file of a configuration, or None where nothing is kept.

    That is where no cache is wanted or possible, where code cannot be read, and of models that bring code of their own:
    nobody knows what else that depends on.
    """
    folder = _folder()
    foreign = not type(config).__module__.startswith("transformers.")
    if folder is None or foreign or (is_trusted() and getattr(config, "auto_map", None)):
        return None
    digest = hashlib.sha256(f"{sys.version}\n{text}\n".encode())
    try:
        for part in _depends_on(config):
            digest.update(part)
    except OSError:  # such as a link to a file that is gone
        return None
    return folder / "exportable" / digest.hexdigest()


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "rankbook"
    try:
        return Path.home() / ".cache/rankbook"
    except RuntimeError:  # a user without a home, as in containers
        return None


def _depends_on(config: Any) -> Iterator[bytes]:
    """Yield every installed package with its version, the code of this one, and that of the model's class."""
    packages = ((found.metadata["Name"], found.version) for found in importlib.metadata.distributions())
    yield repr(sorted(map(str, packages))).encode()
    own = Path(rankbook.__file__).parent
    folders = [own / "plugins", own / "calibration", own / "exporter", Path(inspect.getfile(type(config))).parent]
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            yield file.relative_to(folder).as_posix().encode()
            yield file.read_bytes()
