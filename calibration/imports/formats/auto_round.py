"""AutoRound's own checkpoints: the layouts of GPTQ and AWQ under another name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers
from rankbook.calibration.imports.formats import awq, gptq

_LESS_ONE = {"auto_round:auto_gptq": True, "auto_round:gptqmodel": False, "auto_round": False}
"""Whether a packing in GPTQ's layout stores zero points less one."""
_AWQ = "auto_round:auto_awq"


def check(entry: Mapping[str, object]) -> None:
    """Refuse packings that are neither."""
    packing = entry.get("packing_format")
    if packing not in (*_LESS_ONE, _AWQ):
        known = ", ".join((*_LESS_ONE, _AWQ))
        raise ImportRefusedError(f"packing_format {packing!r} is not known; import reads {known}")


def numbers(tensors: Mapping[str, Tensor], entry: Mapping[str, object]) -> Numbers:
    """Return a layer in the layout that ``packing_format`` names."""
    packing = str(entry.get("packing_format"))
    if packing == _AWQ:
        return awq.of_layout(tensors, "auto-round")
    return gptq.of_layout(tensors, entry, less_one=_LESS_ONE[packing], method="auto-round")


FORMAT = Format(
    "auto-round", "AutoRound", lambda entry: entry.get("quant_method") == "auto-round", "qweight", numbers, check
)
