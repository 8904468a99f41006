"""Models that bring their own Python files: they are refused, never run and never asked about on stdin."""

from __future__ import annotations

CODE_REFUSED = (
    "it needs Python code of its own folder, which rankbook does not run. Give a version of the model that transformers"
    " knows by itself: a newer conversion (often named ...-hf), or remove 'auto_map' where transformers has the"
    " architecture under this model_type"
)
"""What to say of a folder whose code would have to run."""


def asks_for_code(error: Exception) -> bool:
    """Return whether transformers raised ``error`` because it may not run a folder's code."""
    return "trust_remote_code" in str(error)
