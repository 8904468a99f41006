"""Whether numbers are finite, told without a copy of them: a stored embedding may fill most of the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankbook.calibration.memory import relieve

_CHUNK = 1 << 22


def is_finite(values: Tensor) -> bool:
    """Return whether values of any floating dtype and shape hold neither NaN nor infinity."""
    if not values.numel():
        return True
    if values.element_size() == 1:  # 8-bit floats: PyTorch compares them on no CPU
        return all(is_finite(part.float()) for part in torch.split(values.reshape(-1), _CHUNK))
    low, high = torch.aminmax(values.detach())  # NaN passes through
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def check_parameters(module: nn.Module, prefix: str, *, recurse: bool = True) -> None:
    """Check that the parameters of a module, called by their names behind ``prefix``, hold finite numbers.

    Raises:
        ValueError: One does not.
    """
    for name, parameter in module.named_parameters(recurse=recurse):
        if not is_finite(parameter):
            raise ValueError(
                f"{prefix}{name} holds NaN or infinity; the model is damaged: download or convert it again"
            )
        relieve()
