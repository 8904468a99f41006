"""The dialects: in which operators the packed layers of an exported file are written.

A module here that defines ``DIALECT`` is one; its name is what ``--dialect`` takes.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankbook.exporter.dialects.base import Dialect

NATIVE = "rankbook"
"""The dialect of the operators of rankbook, which every checkpoint can be written in."""
DENSE = "dense"
"""The dialect that packs nothing."""


def names() -> tuple[str, ...]:
    """Return the names of the dialects, that of rankbook first; imports none of them."""
    found = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")
    return tuple(sorted(found, key=lambda name: name != NATIVE))


def dialect(name: str) -> Dialect:
    """Return a dialect.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in names():
        raise ValueError(f"dialect {name!r} is unknown; choose one of {', '.join(names())}")
    found: Dialect = importlib.import_module(f"{__name__}.{name}").DIALECT
    return found
