"""What a user must know about a result although it is no error: shown by the command line, and part of its JSON."""

from __future__ import annotations

import warnings


class Note(UserWarning):
    """Something that was repaired, left out or cut short."""


def note(text: str) -> None:
    """Say ``text``, one sentence: as a `Note` among Python's warnings, which the command line collects."""
    warnings.warn(text, Note, stacklevel=3)
