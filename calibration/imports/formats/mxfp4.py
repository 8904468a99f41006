"""MXFP4 of gpt-oss: the matrices of all experts of a block in one tensor of codes and one of exponents."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rankbook.calibration.imports import floats
from rankbook.calibration.imports.base import Format, ImportRefusedError, Numbers, unpacked


def numbers(tensors: Mapping[str, Tensor], _: Mapping[str, object]) -> Numbers:
    """Return the experts of ``blocks`` (E, N, K / 32, 16) uint8 and ``scales`` (E, N, K / 32) in E8M0 below each other.

    Raises:
        ImportRefusedError: Shapes that do not fit each other.
    """
    blocks, scales = tensors["blocks"], tensors.get("scales")
    if scales is None or blocks.ndim != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape:
        held = None if scales is None else tuple(scales.shape)
        raise ImportRefusedError(f"its blocks {tuple(blocks.shape)} and scales {held} are not those of MXFP4")
    codes = unpacked(blocks.flatten(0, 1).flatten(1), 4, 32 * blocks.shape[2])
    return floats.mxfp4(codes, scales.flatten(0, 1), "mxfp4")


FORMAT = Format(
    "mxfp4", "MXFP4 (gpt-oss)", lambda entry: entry.get("quant_method") == "mxfp4", "blocks", numbers, joint="_"
)
