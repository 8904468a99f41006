"""What is on which device while a model is quantized: one block in float32, and the activations while they fit.

The model stays where it was stored, memory-mapped on the host.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankbook.calibration.device import DeviceError, resolve
from rankbook.calibration.memory import beyond_share, relieve
from rankbook.calibration.model.experts import ExpertMatrices
from rankbook.calibration.model.packed_modules import PackedModule

CPU = torch.device("cpu")
TOKENS_PER_BATCH = 4096
"""Tokens that run through a block at once: bounds the working set, large enough for full speed on a CPU."""
_SHARE = 0.5
"""Share of the free memory of a GPU that activations may take without ``--device-memory``."""


@dataclass(frozen=True)
class Placement:
    """The devices of a run.

    Attributes:
        devices: Where layers are solved; the first one holds the block, its statistics and its training.
        room: Bytes of the first one for activations, or None where nothing limits them.
        folder: Where activations wait that are too much for a limit of memory; the system's temporary one for None.
    """

    devices: tuple[torch.device, ...] = (CPU,)
    room: int | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, name: str, indexes: tuple[int, ...] = (), gigabytes: float | None = None) -> Placement:
        """Return what options name.

        Args:
            name: See `rankbook.calibration.device.resolve`.
            indexes: Of devices of that kind that solve layers side by side; none for that device alone.
            gigabytes: Memory for activations; without it half of what is free on a GPU.

        Raises:
            ValueError: There is no such kind of device.
            DeviceError: A device is not there.
        """
        devices: tuple[torch.device, ...] = (resolve(name),)
        if indexes:
            if devices[0] == CPU:
                raise DeviceError(
                    f"--devices {','.join(map(str, indexes))} are GPUs, and --device {name} is the CPU here, which"
                    " solves layers by itself; leave out --devices, or give --device cuda where there are GPUs"
                )
            devices = tuple(resolve(f"{devices[0].type}:{index}") for index in indexes)
        room = None if gigabytes is None else int(gigabytes * 1e9)
        if room is None and devices[0].type == "cuda":
            room = int(_SHARE * torch.cuda.mem_get_info(devices[0])[0])
        return cls(devices, room)

    @property
    def device(self) -> torch.device:
        """The first one."""
        return self.devices[0]

    def shared(self, streams: int) -> Placement:
        """Return the placement of each of some streams."""
        return replace(self, room=None if self.room is None else self.room // streams)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return room for activations: on the device if it suffices, else in (for CUDA: pinned) host memory.

        What takes too much of a limit of the host's memory is in a file without a name, which ends with the tensor.

        Raises:
            OSError: The disk has no room for it.
        """
        size = math.prod(shape) * dtype.itemsize
        fits = self.room is None or size <= self.room
        if (not fits or self.device == CPU) and beyond_share(size):
            return self.in_file(shape, dtype)
        if fits:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def in_file(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return room in a file without a name, which ends with the tensor.

        Raises:
            OSError: The disk has no room for it.
        """
        size = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a signal once the file is mapped
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    what = f"{size / 1e9:.2g} GB of calibration data wait there"
                    why = f"{error.strerror}: {what}; free room, or give a larger --memory-limit"
                    raise OSError(error.errno, why, str(self.folder or tempfile.gettempdir())) from error
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=(size,))).view(dtype).view(shape)

    @contextlib.contextmanager
    def enough_memory(self, name: str, block: nn.Module, activations: Sequence[Tensor]) -> Iterator[None]:
        """Say what would fit where the first device has no memory left for a block.

        Raises:
            DeviceError: It has none.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            kept = sum(values.nbytes for values in activations if values.device == self.device)
            weights = 4 * sum(parameter.numel() for parameter in block.parameters())
            way = "--device-memory 0 (activations wait in host memory) or " if kept else ""
            raise DeviceError(
                f"the memory of {self.device} does not suffice for {name}: its weights take {weights / 1e9:.2g} GB in"
                f" float32, activations kept there {kept / 1e9:.2g} GB, training several times the weights. Give {way}"
                "--device cpu, with --resume to go on at this block"
            ) from error


@dataclass
class Stream:
    """What flows from block to block.

    Attributes:
        values: (sequences, length, width) in the model's dtype; the width is that of the hidden state, or more where
            more flows (`rankbook.calibration.model.calls`). In float32 once a value is beyond that dtype's range.
        placement: Where it is and where it is computed with.
    """

    values: Tensor
    placement: Placement = Placement()

    def copied(self) -> Stream:
        """Return a stream of the same values."""
        return self._as(self.values.dtype)

    def batches(self) -> Iterator[Tensor]:
        """Yield the values, some sequences at a time, float32 on the device."""
        return batches(self.values, self.placement.device)

    def write(self, begin: int, batch: Tensor, what: str) -> None:
        """Put a batch of new values, float32, in the place of those from sequence ``begin`` on.

        Raises:
            ValueError: They are not finite.
        """
        peak = float(batch.abs().max())
        if not math.isfinite(peak):
            raise ValueError(
                f"{what} computes NaN or infinity in float32: the weights are damaged or were converted wrongly;"
                " download or convert the model again"
            )
        if peak > torch.finfo(self.values.dtype).max:
            self.values = self._as(torch.float32).values
        self.values[begin : begin + len(batch)].copy_(batch)
        relieve()

    def _as(self, dtype: torch.dtype) -> Stream:
        return Stream(self.placement.empty(tuple(self.values.shape), dtype).copy_(self.values), self.placement)


def batches(values: Tensor, device: torch.device = CPU) -> Iterator[Tensor]:
    """Yield values (sequences, length, ...), some sequences at a time, float32 on a device."""
    for batch in torch.split(values, batch_size(values)):
        yield batch.to(device, torch.float32)
        relieve()


def batch_size(stream: Tensor) -> int:
    """Return how many sequences of stream (sequences, length, ...) run at once."""
    return max(1, TOKENS_PER_BATCH // stream.shape[1])


def within_range(model: Any, device: torch.device = CPU) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a whole model runs whose activations may leave the range of fp16.

    Matrix products take bf16 there, sums with what they give are in float32; other models run as they are.
    """
    contexts = contextlib.ExitStack()
    if model.dtype == torch.float16:
        for kind in sorted({"cpu", device.type}):
            contexts.enter_context(torch.autocast(kind, torch.bfloat16))
    return contexts


@contextlib.contextmanager
def in_float32(module: nn.Module, device: torch.device = CPU, *, recurse: bool = True) -> Iterator[None]:
    """Bring a module to a device and its floating tensors to float32; packed layers are data and keep their dtypes.

    Afterwards it holds its own tensors again, with new values where they were given some meanwhile.
    """
    with placed(module, device, torch.float32, recurse=recurse):
        yield


@contextlib.contextmanager
def placed(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None = None, *, recurse: bool = True
) -> Iterator[None]:
    """`in_float32` in another dtype; None keeps the dtypes."""
    twins: dict[int, Tensor] = {}
    held: list[tuple[dict[str, Any], str, Tensor, Tensor | None]] = []
    owners = list(module.modules()) if recurse else [module]
    packed = [owner for owner in owners if isinstance(owner, PackedModule | ExpertMatrices)]
    for layer in packed:
        layer.forget_constants()
    for owner in owners:
        wanted = None if isinstance(owner, PackedModule) else dtype
        for tensors in _held(owner):
            for name, tensor in tensors.items():
                if tensor is None or (twin := _twin(tensor, device, wanted, twins)) is tensor:
                    continue
                # A second handle on the data: were it freed, new values could come to lie at the same address. Packed
                # tensors are given none: kernels write them otherwise, and what is stored may be mapped.
                held.append((tensors, name, tensor, None if isinstance(owner, PackedModule) else twin.data))
                tensors[name] = twin
    relieve()
    try:
        yield
    finally:
        for layer in packed:
            layer.forget_constants()
        for tensors, name, tensor, given in held:
            now = tensors[name]
            if given is not None and now.data_ptr() != given.data_ptr():
                tensor.data = now.data.to(tensor.device, tensor.dtype)
            tensors[name] = tensor


def _held(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the dictionaries in which a module holds its own tensors."""
    return module._parameters, module._buffers


def _twin(tensor: Tensor, device: torch.device, dtype: torch.dtype | None, twins: dict[int, Tensor]) -> Tensor:
    """Return a tensor elsewhere, the same twin for one that is held twice; the tensor itself where nothing changes."""
    wanted = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
    if (tensor.device, tensor.dtype) == (device, wanted):
        return tensor
    if id(tensor) not in twins:
        data = tensor.detach().to(device, wanted)
        twins[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return twins[id(tensor)]
