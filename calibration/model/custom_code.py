"""Models that bring their own Python files: they are refused unless trusted, and never asked about on stdin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rankbook.calibration.source import file_of

_TRUSTED: ContextVar[bool] = ContextVar("rankbook_trusted_code", default=False)


@contextmanager
def trusted_code(trusted: bool = True) -> Iterator[None]:
    """Run the Python code of model folders inside the block (``--trust-remote-code``), or, with False, do not."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Return what ``trust_remote_code`` of transformers is to be: False outside of `trusted_code`."""
    return _TRUSTED.get()


def code_refused(location: str) -> str:
    """Return what to say of a folder or Hugging Face id whose code would have to run."""
    named = ", ".join(_files(location))
    files = f" ({named})" if named else ""
    return (
        f"it needs Python code of its own folder{files}, which rankbook does not run by itself. Give a version of the"
        " model that transformers knows: a newer conversion (often named ...-hf), or remove 'auto_map' where"
        " transformers has the architecture under this model_type; or read that code and give --trust-remote-code"
    )


def asks_for_code(error: Exception) -> bool:
    """Return whether transformers raised ``error`` because it may not run a folder's code."""
    return "trust_remote_code" in str(error)


def _files(location: str) -> list[str]:
    """Return the files, or ``owner/name--file`` of another model, that config.json and the tokenizer's name."""
    found: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            file = file_of(location, name)
            entries = json.loads(file.read_text(encoding="utf-8")).get("auto_map", {}) if file else {}
        except (OSError, ValueError, AttributeError):
            continue
        for entry in entries.values() if isinstance(entries, dict) else ():
            classes = entry if isinstance(entry, list) else [entry]
            found |= {f"{str(one).rpartition('.')[0]}.py" for one in classes if one}
    return sorted(found)
