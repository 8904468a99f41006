"""Why a model cannot be exported, as a sentence."""

from __future__ import annotations

import re
import traceback
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

TRACE_ERRORS = (
    *(AssertionError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError),
)
"""What running a model's code raises where it is not made for the exporter."""


class NotExportableError(ValueError):
    """A model that cannot be written as an ONNX graph; the message says what it has that is not served."""

    def __init__(self, config: Any, reason: str) -> None:
        super().__init__(
            f"a model of type {config.model_type!r} cannot be exported: {reason}; its checkpoint runs in PyTorch only"
        )
        self.reason = reason


def by_reason(refused: Mapping[str, str]) -> str:
    """Say why layers are refused: each reason once, with a layer as an example."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in refused.items():
        names[reason].append(name)
    more = {reason: f" and {len(found) - 1} more" if len(found) > 1 else "" for reason, found in names.items()}
    return "; ".join(f"{found[0]}{more[reason]}: {reason}" for reason, found in names.items())


def traced(config: Any, error: BaseException) -> NotExportableError:
    """Return what an exception of a trace means: the place in the model's code, and the first cause in one line."""
    cause = error
    while (before := cause.__cause__ or cause.__context__) is not None:
        cause = before
    everything = "".join(str(item) for item in (error, error.__cause__ or "", cause))
    if found := re.search(r"No ONNX function found for <?OpOverload\(op='(?:\w+\.)?([\w.]+)'", everything):
        what = "grouped products of experts have" if "grouped_mm" in found[1] else f"its operator {found[1]} has"
        return NotExportableError(config, f"{what} no ONNX form")
    stack = traceback.extract_tb(cause.__traceback__)
    if any(frame.filename.endswith("/integrations/moe.py") for frame in stack):
        return NotExportableError(config, "experts of a mixture that share one tensor are not served")
    text = " ".join(str(cause).split())[:200].rstrip(".")
    frames = [frame for frame in stack if "/transformers/models/" in frame.filename]
    if not frames:
        return NotExportableError(config, f"it cannot be traced ({text})")
    place = f"{frames[-1].filename.rpartition('/transformers/')[2]}, line {frames[-1].lineno}"
    return NotExportableError(config, f"its code cannot be traced at {place} ({text})")
