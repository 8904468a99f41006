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
    return mark is not None and mark.is_file()


def keep(config: Any, text: str) -> None:
    """Note that a model can be exported, where the cache can be written."""
    if (mark := _mark(config, text)) is not None:
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def _mark(config: Any, text: str) -> Path | None:
    """Return the file of a configuration; None where no cache is wanted, or where the model brings code of its own."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankbook"
    folder = os.environ.get(VARIABLE, str(home))
    if not folder or (is_trusted() and getattr(config, "auto_map", None)):
        return None
    digest = hashlib.sha256(f"{sys.version}\n{text}\n".encode())
    for part in _depends_on(config):
        digest.update(part)
    return Path(folder) / "exportable" / digest.hexdigest()


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
