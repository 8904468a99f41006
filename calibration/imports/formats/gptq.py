"""GPTQ as AutoGPTQ and GPTQModel store it: codes packed along the inputs, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, check_order, unpacked


def check(entry: Mapping[str, object]) -> None:
    """Refuse layouts of other kernels."""
    kind = str(entry.get("checkpoint_format") or "gptq")
    if kind not in ("gptq", "gptq_v2"):
        raise ImportRefusedError(
            f"checkpoint_format {kind!r} is the layout of one kernel; save it as 'gptq' or 'gptq_v2' with GPTQModel"
        )


def numbers(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Numbers:
    """Return a layer of ``qweight`` (K b / 32, N), ``qzeros`` (G, N b / 32), ``scales`` (G, N).

    The first version of the format stores zero points less one (0 as the largest code), the second as they are.
    """
    return of_layout(tensors, entry, less_one=entry.get("checkpoint_format") != "gptq_v2", method="gptq")


def of_layout(tensors: Mapping[str, Tensor], entry: Mapping[str, Any], *, less_one: bool, method: str) -> Numbers:
    """Return a layer of tensors in this layout; ``less_one`` says how zero points are stored.

    Raises:
        ImportRefusedError: Shapes of another layout, or of other bits than ``entry`` names.
    """
    codes, zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, rows = scales.shape
    bits = 32 * zeros.shape[1] // rows
    if bits == 0 or zeros.shape[1] * 32 != bits * rows or codes.shape[1] != rows:
        raise ImportRefusedError(f"qweight {tuple(codes.shape)} and qzeros {tuple(zeros.shape)} are of no GPTQ layout")
    if (named := _widths(entry)) and bits not in named:
        raise ImportRefusedError(
            f"its shapes are those of {bits} bits, and quantization_config says {' or '.join(map(str, sorted(named)))};"
            " one of the two is of another checkpoint, download it again"
        )
    columns = codes.shape[0] * 32 // bits
    check_order(tensors, "g_idx", columns, groups)
    points = unpacked(zeros, bits, rows).T.int()
    if less_one:
        points = (points + 1) & ((1 << bits) - 1)
    return Numbers(unpacked(codes.T, bits, columns), bits, [scales.T], method, zeros=points)


def _widths(entry: Mapping[str, Any]) -> set[int]:
    """Return the bits that an entry names, for all layers or some (``dynamic``, in AutoRound ``extra_config``)."""
    some = [{**(entry.get(name) or {})} for name in ("dynamic", "extra_config")]
    each = [entry, *(one for layers in some for one in layers.values() if isinstance(one, Mapping))]
    return {int(one["bits"]) for one in each if one.get("bits") is not None}


FORMAT = Format(
    "gptq", "GPTQ (GPTQModel, AutoGPTQ)", lambda entry: entry.get("quant_method") == "gptq", "qweight", numbers, check
)
