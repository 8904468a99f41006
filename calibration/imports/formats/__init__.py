"""The formats of other tools, discovered: a module here that defines ``FORMAT`` is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from rankbook.calibration.imports.base import Format


@functools.cache
def formats() -> dict[str, Format]:
    """Return every format of Hugging Face folders by name."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    found = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {one.name: one for one in found}


def format_of(location: str, entry: Mapping[str, Any]) -> Format:
    """Return the format of a checkpoint by the quantization entry of its config.json.

    Raises:
        ValueError: It is none that is read; the message names those that are.
    """
    for one in formats().values():
        if one.claims(entry):
            return one
    method = entry.get("quant_method") or entry.get("format")
    known = ", ".join(one.title for one in formats().values())
    raise ValueError(f"{location} is quantized by {method!r}; what can be imported is {known}, and GGUF files")
