"""The memory of a GPU and the one stream on which an engine works, through PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rankbook.tools.errors import MissingError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = np.ndarray[Any, Any]


class Region(ABC):
    """A piece of device memory, which lives as long as this object.

    Attributes:
        address: Of its first byte.
        size: Bytes.
    """

    address: int
    size: int


class Part(Region):
    """The end of a region, which lives as long as this."""

    def __init__(self, whole: Region, offset: int) -> None:
        self.whole, self.address, self.size = whole, whole.address + offset, whole.size - offset


class DeviceMemory(ABC):
    """Device memory and one stream; `upload`, `download` and what an engine queues run there in order.

    Attributes:
        stream: Handle of the stream, for TensorRT.
        device: Name of the device, for people.
        capability: Compute capability, e.g. ``SM89``.
    """

    stream: int
    device: str
    capability: str

    @abstractmethod
    def allocate(self, size: int) -> Region:
        """Return ``size`` bytes of device memory, all zero.

        Raises:
            MemoryError: There are not as many.
        """

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return an array of zeros in host memory that the device reads and writes by itself."""

    @abstractmethod
    def upload(self, region: Region, values: Array) -> None:
        """Queue a copy of an array of `pinned` to the beginning of a region; it must not change before `finish`."""

    @abstractmethod
    def download(self, values: Array, region: Region, offset: int = 0) -> None:
        """Queue a copy from a region, ``offset`` bytes behind its beginning, to an array of `pinned`."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything that was queued is done."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what ``work`` queues, without running it; return a function that queues all of it at once.

        Raises:
            RuntimeError: It does something that cannot be recorded.
        """

    @abstractmethod
    def room(self) -> tuple[int, int]:
        """Return the free bytes of the device, and all of them."""


class TorchMemory(DeviceMemory):
    """A GPU that PyTorch sees."""

    def __init__(self, index: int | None = None) -> None:
        """Take a GPU, the current one when ``index`` is None.

        Raises:
            MissingError: PyTorch sees none.
        """
        import torch

        from rankbook.tools.runtimes.trt import gpu_unavailable

        if not torch.cuda.is_available():
            raise MissingError(gpu_unavailable() or "PyTorch sees no GPU: `rankbook doctor` lists what is installed")
        index = torch.cuda.current_device() if index is None else index
        self._device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(self._device)
        self.device, self.capability = properties.name, f"SM{properties.major}{properties.minor}"
        stream: Any = torch.cuda.Stream  # untyped
        self._stream = stream(self._device)
        self.stream = self._stream.cuda_stream

    def allocate(self, size: int) -> Region:
        """See `DeviceMemory.allocate`."""
        import torch

        try:
            with torch.cuda.stream(self._stream):
                return _TorchRegion(torch.zeros(max(1, size), dtype=torch.uint8, device=self._device))
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None

    def pinned(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """See `DeviceMemory.pinned`."""
        import numpy as np
        import torch

        kind = np.dtype(dtype)
        count = int(np.prod(shape)) * kind.itemsize
        values: Array = torch.zeros(count, dtype=torch.uint8, pin_memory=True).numpy().view(kind).reshape(shape)
        return values

    def upload(self, region: Region, values: Array) -> None:
        """See `DeviceMemory.upload`."""
        import torch

        with torch.cuda.stream(self._stream):
            _tensor(region)[: values.nbytes].copy_(_bytes(values), non_blocking=True)

    def download(self, values: Array, region: Region, offset: int = 0) -> None:
        """See `DeviceMemory.download`."""
        import torch

        with torch.cuda.stream(self._stream):
            _bytes(values).copy_(_tensor(region)[offset : offset + values.nbytes], non_blocking=True)

    def finish(self) -> None:
        """See `DeviceMemory.finish`."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `DeviceMemory.capture`."""
        import torch

        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads of the process do with the device must not end the capture. The outer stream
        # is left in any case, that of a capture only where it succeeds.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def room(self) -> tuple[int, int]:
        """See `DeviceMemory.room`."""
        import torch

        free, total = torch.cuda.mem_get_info(self._device)
        return free, total


class _TorchRegion(Region):
    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.address, self.size = tensor.data_ptr(), tensor.numel()


def _tensor(region: Region) -> Any:
    if not isinstance(region, _TorchRegion):
        raise TypeError(f"{type(region).__name__} is not memory of PyTorch")
    return region.tensor


def _bytes(values: Array) -> Any:
    """The bytes of a contiguous array as a tensor of the same memory."""
    import numpy as np
    import torch

    return torch.from_numpy(values.reshape(-1).view(np.uint8))


def memory() -> DeviceMemory:
    """Return the memory of the GPU.

    Raises:
        MissingError: There is none, or PyTorch does not see it.
    """
    return TorchMemory()
