"""Host memory in the place of a GPU's, and a stream whose work is done when it is waited for."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from rankbook.tools.runtimes.trt_memory import DeviceMemory, Region

_handles = itertools.count(7000)
streams: weakref.WeakValueDictionary[int, HostMemory] = weakref.WeakValueDictionary()
"""The memory of each stream, by handle."""


class HostRegion(Region):
    """Host memory in place of a GPU's."""

    def __init__(self, size: int) -> None:
        self.array = np.zeros(max(1, size), np.uint8)
        self.address, self.size = self.array.ctypes.data, size


class HostMemory(DeviceMemory):
    """Host memory, and a stream whose work is done when it is waited for.

    Attributes:
        launches: How often a recorded graph was run.
        downloaded: Bytes of each copy from the device.
    """

    def __init__(self, total: int = 1 << 30, capability: str = "SM86") -> None:
        self.stream, self.device, self.capability = next(_handles), "Stand-in GPU", capability
        self.total = total
        self.launches = 0
        self.downloaded: list[int] = []
        self._regions: weakref.WeakSet[HostRegion] = weakref.WeakSet()
        self._pinned: list[Any] = []
        self.queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        streams[self.stream] = self

    def allocate(self, size: int) -> Region:
        if size > self.room()[0]:
            raise MemoryError("out of memory")
        region = HostRegion(size)
        self._regions.add(region)
        return region

    def pinned(self, shape, dtype):
        array = np.zeros(shape, dtype)
        self._pinned.append(array)
        return array

    def upload(self, region: Region, values) -> None:
        self._check_pinned(values)
        target, source, size = region.address, values.ctypes.data, values.nbytes
        assert size <= region.size, "an upload beyond the end of the memory"
        self.push(lambda: self._copy(target, source, size, device=target))

    def download(self, values, region: Region, offset: int = 0) -> None:
        self._check_pinned(values)
        source, target, size = region.address + offset, values.ctypes.data, values.nbytes
        assert offset + size <= region.size, "a download beyond the end of the memory"

        def fetch() -> None:
            self._copy(target, source, size, device=source)
            self.downloaded.append(size)

        self.push(fetch)

    def finish(self) -> None:
        assert self._recording is None, "a stream must not be waited for while it is recorded"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        recorded: list[Callable[[], None]] = []
        self._recording = recorded
        try:
            work()
        finally:
            self._recording = None

        def replay() -> None:
            self.launches += 1
            self.queue.extend(recorded)

        return replay

    def room(self) -> tuple[int, int]:
        return self.total - sum(region.size for region in self._regions), self.total

    def check_live(self, address: int, size: int) -> None:
        """Check that a piece of memory was taken here and is not freed."""
        spans = [(region.address, region.address + region.size) for region in self._regions]
        inside = (begin <= address and address + size <= end for begin, end in spans)
        assert any(inside), "device memory that was never taken, is too small, or was freed while it was in use"

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def push(self, work: Callable[[], None]) -> None:
        (self.queue if self._recording is None else self._recording).append(work)

    def _copy(self, target: int, source: int, size: int, device: int) -> None:
        self.check_live(device, size)
        ctypes.memmove(target, source, size)

    def _check_pinned(self, values) -> None:
        assert values.flags.c_contiguous
        inside = (
            array.ctypes.data <= values.ctypes.data
            and values.ctypes.data + values.nbytes <= array.ctypes.data + array.nbytes
            for array in self._pinned
        )
        assert any(inside), "only pinned memory is copied without waiting"
