"""AWQ as AutoAWQ stores it: four bits, in the layout of its gemm kernel (packed along the outputs) or of its gemv."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, unpacked

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight neighbouring outputs lies in a word of gemm."""


def check(entry: Mapping[str, object]) -> None:
    """Refuse layouts of other kernels and other widths."""
    if (version := _version(entry)) not in ("gemm", "gemv"):
        raise ImportRefusedError(
            f"version {version!r} of AWQ is the layout of one kernel; take a 'gemm' or 'gemv' checkpoint"
        )
    bits = entry.get("bits", entry.get("w_bit", _BITS))
    if bits != _BITS:
        raise ImportRefusedError(f"AWQ in {bits} bits is not known; its layout has 4")


def numbers(tensors: Mapping[str, Tensor], entry: Mapping[str, object]) -> Numbers:
    """Return a layer of either version."""
    if _version(entry) == "gemm":
        return of_layout(tensors, "awq")
    return _of_gemv(tensors, int(str(entry.get("group_size", entry.get("q_group_size", 128)))))


def of_layout(tensors: Mapping[str, Tensor], method: str) -> Numbers:
    """Return a layer of gemm's ``qweight`` (K, N / 8), ``qzeros`` (G, N / 8), ``scales`` (G, N)."""
    scales = tensors["scales"]
    rows = scales.shape[1]
    if tensors["qweight"].shape[1] * 8 != rows or tensors["qzeros"].shape != (len(scales), rows // 8):
        raise ImportRefusedError(f"qweight {tuple(tensors['qweight'].shape)} is not in the layout of AutoAWQ's gemm")
    order = torch.arange(rows).view(-1, 8)[:, _PLACES].flatten()
    codes, zeros = (unpacked(tensors[name], _BITS, rows)[:, order].T for name in ("qweight", "qzeros"))
    return Numbers(codes, _BITS, [scales.T], method, zeros=zeros.int())


def _of_gemv(tensors: Mapping[str, Tensor], group: int) -> Numbers:
    """Return a layer of gemv's ``qweight`` (N, K / 8), ``qzeros`` (N, Z), ``scales`` (N, 8 Z); Z holds G, padded."""
    codes, zeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    columns = codes.shape[1] * 8
    group = columns if group < 0 else group
    groups = columns // group
    if codes.shape[0] != scales.shape[0] or scales.shape[1] != 8 * zeros.shape[1] or scales.shape[1] < groups:
        raise ImportRefusedError(f"qweight {tuple(codes.shape)} is not in the layout of AutoAWQ's gemv")
    if columns % group or bool(scales[:, groups:].any()):
        raise ImportRefusedError(
            f"its scales {tuple(scales.shape)} are not those of groups of {group}, which quantization_config says; one"
            " of the two is of another checkpoint, download it again"
        )
    points = unpacked(zeros, _BITS, groups).int()
    return Numbers(unpacked(codes, _BITS, columns), _BITS, [scales[:, :groups]], "awq", zeros=points)


def _version(entry: Mapping[str, object]) -> str:
    return str(entry.get("version") or entry.get("checkpoint_format") or "gemm").lower()


FORMAT = Format("awq", "AWQ (AutoAWQ)", lambda entry: entry.get("quant_method") == "awq", "qweight", numbers, check)
