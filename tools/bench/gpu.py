"""What the GPU did meanwhile: clocks, power and name through NVML, and the bandwidth of a plain copy."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

COPY_BYTES = 1 << 30
"""Far more than any cache of a GPU holds."""


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU.

    Attributes:
        graphics_mhz: Clock of the multiprocessors.
        memory_mhz: Clock of the memory.
        watts: Power.
        celsius: Temperature.
    """

    graphics_mhz: int
    memory_mhz: int
    watts: float
    celsius: int


def nvml_unavailable() -> str | None:
    """Return why clocks and power cannot be read, or None."""
    return None if find_spec("pynvml") else "nvidia-ml-py is not installed: pip install nvidia-ml-py"


class GpuWatch:
    """Looks at a GPU now and then."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """Begin.

        Args:
            uuid: Of the GPU, as PyTorch writes it. NVML counts all GPUs of the machine, PyTorch those it may use.
            nvml: The module ``pynvml``; imported when None.
        """
        nvml = nvml or importlib.import_module("pynvml")
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        self.states: list[GpuState] = []

    def look(self) -> None:
        """Note the present state."""
        nvml, handle = self._nvml, self._handle
        self.states.append(
            GpuState(
                graphics_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                memory_mhz=int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                watts=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                celsius=int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            )
        )

    def describe(self) -> dict[str, Any]:
        """Return name, driver and the span of what was seen."""
        nvml = self._nvml
        name, driver = nvml.nvmlDeviceGetName(self._handle), nvml.nvmlSystemGetDriverVersion()
        return {
            "gpu": _text(name),
            "driver": _text(driver),
            "graphics_mhz": _span(state.graphics_mhz for state in self.states),
            "memory_mhz": _span(state.memory_mhz for state in self.states),
            "watts": _span(state.watts for state in self.states),
            "celsius": _span(state.celsius for state in self.states),
        }


def copy_bandwidth(repeats: int = 10) -> float:
    """Return bytes per second that a copy within the GPU's memory moves, read and written; the best of some."""
    import torch

    event: Any = torch.cuda.Event  # untyped
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeats + 1):
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / best


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _span(values: Iterable[float]) -> list[float]:
    found = list(values)
    return [min(found), max(found)] if found else []
