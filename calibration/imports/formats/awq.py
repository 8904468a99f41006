"""AWQ as AutoAWQ stores it (version gemm): four bits, packed along the outputs in an interleaved order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, affine, unpacked
from rankbook.calibration.record.quantized_linear import QuantizedLinear

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring outputs lies in a word."""


def check(entry: Mapping[str, object]) -> None:
    """Refuse layouts of other kernels and other widths."""
    version = str(entry.get("version") or entry.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise ImportRefusedError(f"version {version!r} of AWQ is the layout of one kernel; take a 'gemm' checkpoint")
    bits = entry.get("bits", entry.get("w_bit", _BITS))
    if bits != _BITS:
        raise ImportRefusedError(f"AWQ in {bits} bits is not known; its layout has 4")


def record(tensors: Mapping[str, Tensor], _: Mapping[str, object]) -> QuantizedLinear:
    """Return the record of a layer of ``qweight`` (K, N / 8), ``qzeros`` (G, N / 8), ``scales`` (G, N)."""
    return of_layout(tensors, "awq")


def of_layout(tensors: Mapping[str, Tensor], method: str) -> QuantizedLinear:
    """Return the record of tensors in this layout."""
    scales = tensors["scales"]
    rows = scales.shape[1]
    if tensors["qweight"].shape[1] * 8 != rows or tensors["qzeros"].shape != (len(scales), rows // 8):
        raise ImportRefusedError(f"qweight {tuple(tensors['qweight'].shape)} is not in the layout of AutoAWQ's gemm")
    order = torch.arange(rows).view(-1, 8)[:, _PLACES].flatten()
    codes, zeros = (unpacked(tensors[name], _BITS, rows)[:, order].T for name in ("qweight", "qzeros"))
    return affine(codes, _BITS, scales.T, zeros.int(), method)


FORMAT = Format("awq", "AWQ (AutoAWQ)", lambda entry: entry.get("quant_method") == "awq", "qweight", record, check)
