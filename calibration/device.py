"""Where PyTorch computes: the option, what it names on this machine, and tensors brought there."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from rankbook.calibration.option import Options, option

if TYPE_CHECKING:
    import torch

AUTO = "auto"
_NAME = re.compile(r"auto|[a-z][a-z0-9]*(:\d+)?")
_Held = TypeVar("_Held")


class DeviceError(RuntimeError):
    """A device that is not there, or whose memory does not suffice; the message says what to do."""


def device_name(text: str) -> str:
    """Read the name of a device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: It is none of these.
    """
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a device; give auto, cpu, cuda or cuda:N")
    return text


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where PyTorch computes."""

    device: str = option(
        AUTO,
        "where PyTorch computes: auto (cuda where there is one), cpu, cuda, cuda:N",
        metavar="D",
        parse=device_name,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        device_name(self.device)


def resolve(name: str) -> torch.device:
    """Return the device that ``name`` means on this machine, with an index unless it is the CPU.

    Besides the CPU and CUDA, a backend that another package has registered with PyTorch is taken by its name.

    Raises:
        ValueError: No such kind of device.
        DeviceError: It is not there; nothing else is taken in its place.
    """
    import torch

    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device_name(name).partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind not in ("cuda", torch._C._get_privateuse1_backend_name()):
        raise ValueError(f"PyTorch has no device {name!r} that is supported; give auto, cpu, cuda or cuda:N")
    backend: Any = getattr(torch, kind)
    if not backend.is_available():
        raise DeviceError(f"--device {name}: {_absent(kind)}; give --device cpu, or auto to take what there is")
    count = backend.device_count()
    chosen = int(index) if index else backend.current_device()
    if chosen >= count:
        raise DeviceError(f"--device {name}: there are {count} devices of that kind, {kind}:0 to {kind}:{count - 1}")
    return torch.device(kind, chosen)


def _absent(kind: str) -> str:
    import torch

    if kind == "cuda" and torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; install its CUDA wheel"
    return "PyTorch finds no GPU: `nvidia-smi` must list one, and its driver must be as new as PyTorch's CUDA asks"


def moved(value: _Held, device: torch.device) -> _Held:
    """Return a tensor, or a dataclass with all tensors in it, on a device; what is there already is not copied."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        found = {name: moved(one, device) for name, one in held.items()}
        return dataclasses.replace(value, **{name: one for name, one in found.items() if one is not held[name]})
    return value
