"""The methods, discovered: a module here that defines ``METHOD`` is one."""

from __future__ import annotations

import importlib
import pkgutil

from rankbook.calibration.fitting.problem import BlockProblem, LayerProblem
from rankbook.calibration.methods.base import Method

__all__ = ["METHODS", "BlockProblem", "LayerProblem", "Method"]


def _discover() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        method = getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHOD", None)
        if isinstance(method, Method):
            found[method.name] = method
    return found


METHODS: dict[str, Method] = _discover()
"""Every method by name."""
