"""Group parameters in fewer bits than operators take them in, as other tools store them: decoded when they are read.

A checkpoint and a module in PyTorch hold the compact tensors, under the names of the wide ones; an exported file holds
coefficients and offsets in float32 (`LayerSpec.compact`). The products are exact in float32, or are what the format
itself computes there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rankbook.plugins.layer_spec import LayerSpec


def widened(tensors: Mapping[str, Tensor], spec: LayerSpec) -> dict[str, Tensor]:
    """Return the packed tensors of ``spec.wide()`` from those of ``spec``, or from stacks of them."""
    found = dict(tensors)
    if spec.compact:
        params, step = found["params"], found["step"]
        lead = params.shape[:-4]
        found["step"] = decoded(spec.compact, params, step, axis=-2)
        found["params"] = torch.ones(*lead, 1, 1, 1, 1, dtype=torch.int8, device=params.device)
        found["base"] = torch.zeros(*lead, 1, 1, 1, 1, device=params.device)
    return found


def decoded(compact: str, params: Tensor, step: Tensor, axis: int) -> Tensor:
    """Return coefficients and offsets, float32, along an axis of planes.

    Args:
        compact: ``zeros``: scales and zero points, of which coefficient and offset are made; ``e4m3``: FP8 in int8.
        params: Zero points, or codes of E4M3, int8.
        step: Scales, or what the numbers in E4M3 are multiplied by.
        axis: The axis of planes.
    """
    if compact == "zeros":
        scales = step.float()
        return torch.cat([scales, -(scales * params.float())], axis)
    return params.view(torch.float8_e4m3fn).float() * step
