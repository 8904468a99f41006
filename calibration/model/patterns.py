"""Patterns that name layers: whole names with the wildcards of `fnmatch`, each of which must match something."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

_NEAR = 3
"""Names that an error suggests."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a layer's whole name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(option: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Check that every pattern of an option matches a layer.

    Raises:
        ValueError: One matches none; the message names what was probably meant.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{option} {pattern!r} matches none of the {len(names)} layers; a pattern stands for whole names, * for"
                f" any text and ? for one character{_meant(pattern, names)}"
            )


def _meant(pattern: str, names: Collection[str]) -> str:
    """Say what a pattern that matches nothing was probably meant to be."""
    if (expression := _regular(pattern)) is not None:
        wildcard = re.sub(r"\.[*+]", "*", expression).replace("\\.", ".").strip("^$")
        wildcard = next((w for w in (wildcard, f"*{wildcard}") if any(fnmatchcase(n, w) for n in names)), "")
        return f"; {pattern!r} is a regular expression" + (f": write {wildcard!r}" if wildcard else "")
    for wildcard in (f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*", f"*{pattern}*"):
        if any(fnmatchcase(name, wildcard) for name in names):
            return f": write {wildcard!r}"
    leaves = {name.rpartition(".")[2]: f"*.{name.rpartition('.')[2]}" for name in names}
    near = [leaves[leaf] for leaf in difflib.get_close_matches(pattern.strip("*.").rpartition(".")[2], leaves, _NEAR)]
    near = near or difflib.get_close_matches(pattern, names, _NEAR) or sorted(set(leaves.values()))[: 2 * _NEAR]
    return f"; near ones are {', '.join(map(repr, near))}"


def _regular(pattern: str) -> str | None:
    """Return the regular expression that a pattern is, as other quantizers take them; None for a wildcard pattern."""
    if pattern.startswith("re:"):
        return pattern.removeprefix("re:")
    return pattern if re.search(r"\.[*+]|[\\^$|()+]", pattern) else None
