"""An engine with its device memory: tensors bound once, one context, one stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankbook.tools.errors import CheckFailedError, UsageError
from rankbook.tools.runtimes.trt_load import Loader, library

if TYPE_CHECKING:
    import numpy as np

    from rankbook.tools.deploy.manifest import Manifest
    from rankbook.tools.runtimes.trt_memory import DeviceMemory, Region

    Array = np.ndarray[Any, Any]

RUNTIME_CACHE_NAME = "runtime.cache"
"""What TensorRT-RTX compiled on this GPU at first use, beside the engine; later runs start from it."""
_NUMPY = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "uint8",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Bounds = Mapping[str, tuple[Shape, Shape]]
"""Smallest and largest shape by the name of the input."""


@dataclass(frozen=True)
class Plan:
    """What the owner of an engine knows of its tensors.

    Attributes:
        largest: Shapes of all inputs that fit each other and make every output as large as a profile allows.
        swapped: Inputs by the outputs that take turns with them: what was written is read by the next call.
    """

    largest: Callable[[Bounds], Shapes] = lambda bounds: {name: high for name, (_, high) in bounds.items()}
    swapped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Copy:
    """A part of an output that is wanted on the host.

    Attributes:
        name: The output.
        to: An array of `DeviceMemory.pinned`.
        offset: Bytes of the output before it.
    """

    name: str
    to: Array
    offset: int = 0


class Engine:
    """A loaded engine.

    Attributes:
        inputs: Type of each input by name, as numpy names it.
        outputs: The same for outputs.
        aliased: Inputs by the outputs that are written into their memory.
        profiles: Bounds of the inputs, by profile.
    """

    def __init__(self, manifest: Manifest, bindings: Any, memory: DeviceMemory) -> None:
        """Load it.

        Raises:
            UsageError: It is for another GPU, of another version, or does not fit the memory.
            MissingError: The driver or the plugin library is missing or too old.
            CheckFailedError: The library refuses it for another reason.
        """
        self.name, self.memory, self._bindings = str(manifest.folder), memory, bindings
        self._loader = Loader(manifest, bindings, memory)
        self._runtime, self._engine = self._loader.load()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: _NUMPY[self._engine.get_tensor_dtype(name).name] for name in names}
        is_input = {name: self._engine.get_tensor_mode(name) == bindings.TensorIOMode.INPUT for name in names}
        self.inputs = {name: kinds[name] for name in names if is_input[name]}
        self.outputs = {name: kinds[name] for name in names if not is_input[name]}
        found = {name: self._engine.get_aliased_input_tensor(name) for name in self.outputs}
        self.aliased: Mapping[str, str] = {name: source for name, source in found.items() if source}
        self.profiles = [self._bounds(index) for index in range(self._engine.num_optimization_profiles)]
        self._cache_file = manifest.folder / RUNTIME_CACHE_NAME
        self._runtime_cache: Any = None
        self._context = self._make_context()
        self._profile: int | None = None
        self._shapes: dict[str, Shape] = {}
        self._places: dict[str, Region] = {}
        self._regions: dict[str, Region] = {}
        self._last: tuple[Any, ...] | None = None
        self._graph: tuple[tuple[Any, ...], Callable[[], None]] | None = None

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory: weights (the engine's file), scratch memory and tensors."""
        tensors = sum(region.size for region in self._regions.values())
        return self._loader.manifest.engine.stat().st_size + int(self._engine.device_memory_size_v2) + tensors

    def region(self, name: str) -> Region:
        """Return the memory of a tensor, an aliased output's is its input's."""
        return self._regions[self.aliased.get(name, name)]

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor for the inputs that are set."""
        return tuple(self._context.get_tensor_shape(name))

    def reserve(self, plan: Plan) -> None:
        """Take the memory of every tensor at its largest shape over the profiles, once.

        Raises:
            UsageError: There is not as much.
        """
        sizes: dict[str, int] = {}
        for profile, bounds in enumerate(self.profiles):
            self._switch(profile)
            self._set_shapes(plan.largest(bounds))
            for name, kind in {**self.inputs, **self.outputs}.items():
                shape = bounds[name][1] if name in bounds else self.shape(name)
                sizes[name] = max(sizes.get(name, 0), math.prod(shape) * _width(kind))
        for output, source in plan.swapped.items():
            sizes[output] = sizes[source] = max(sizes[output], sizes[source])
        wanted = {name: size for name, size in sizes.items() if name not in self.aliased}
        caches = sum(size for name, size in wanted.items() if name.startswith(("past_key_values", "present")))
        if sum(wanted.values()) > self.memory.room()[0]:
            raise self._loader.too_large(sum(wanted.values()), caches)
        try:
            self._regions = {name: self.memory.allocate(size) for name, size in wanted.items()}
        except MemoryError as error:
            raise self._loader.too_large(sum(wanted.values()), caches, str(error)) from None

    def clear(self, names: Collection[str]) -> None:
        """Fill the memory of tensors with zeros."""
        regions = [self.region(name) for name in names]
        zeros = self.memory.pinned((max(region.size for region in regions),), "uint8")
        for region in regions:
            self.memory.upload(region, zeros[: region.size])
        self.memory.finish()

    def choose(self, shapes: Shapes) -> int:
        """Return the profile that serves some inputs with the least room beyond them.

        Raises:
            UsageError: None does.
        """
        fitting = [
            (sum(math.prod(bounds[name][1]) for name in shapes), index)
            for index, bounds in enumerate(self.profiles)
            if all(_within(shape, *bounds[name]) for name, shape in shapes.items())
        ]
        if fitting:
            return min(fitting)[1]
        given = ", ".join(f"{name} {_text(shape)}" for name, shape in shapes.items())
        limits = "; ".join(
            ", ".join(f"{name} {_text(bounds[name][0])} to {_text(bounds[name][1])}" for name in shapes)
            for bounds in self.profiles
        )
        raise UsageError(
            f"{given} is outside of the profiles of {self.name} ({limits}); build it with a larger --max-batch,"
            " --max-sequence or --max-context"
        )

    def prepare(self, profile: int, shapes: Shapes, places: Mapping[str, Region]) -> None:
        """Set what the next `run` works on; only what differs from the last one is told to the library.

        Args:
            profile: One that serves the shapes (`choose`).
            shapes: Of every input.
            places: Memory of tensors that is not their own (`region`).
        """
        if profile != self._profile:
            self._switch(profile)
        for name in (*self.inputs, *self.outputs):
            region = places.get(name) or self.region(name)
            if self._places.get(name) is not region:
                self._must(self._context.set_tensor_address(name, region.address), f"the address of {name}")
                self._places[name], self._graph, self._last = region, None, None
        self._set_shapes(shapes)

    def run(self, uploads: Mapping[str, Array], wanted: Sequence[Copy]) -> None:
        """Copy inputs to the device, run, copy outputs back, wait.

        TensorRT-RTX records CUDA graphs by itself. For TensorRT the second call in a row with the same shapes and
        addresses is recorded (the first one may still prepare things), and that and later ones replay it.

        Args:
            uploads: Arrays of `DeviceMemory.pinned`, by the name of the input.
            wanted: What to copy back.

        Raises:
            CheckFailedError: The engine could not run.
        """
        key: tuple[Any, ...] = tuple((name, _place(array)) for name, array in uploads.items())
        key += tuple((item.name, item.offset, _place(item.to)) for item in wanted)

        def queue() -> None:
            for name, array in uploads.items():
                self.memory.upload(self._places[name], array)
            self._must(self._context.execute_async_v3(self.memory.stream), "a run")
            for item in wanted:
                self.memory.download(item.to, self._places[item.name], item.offset)

        last, self._last = self._last, None  # of a run that fails nothing is recorded
        if self._graph is None and self._records and last == key:
            self._graph = self._recorded(key, queue)
        if self._graph is not None and self._graph[0] == key:
            self._graph[1]()
        else:
            queue()
        self.memory.finish()
        self._last = key

    def _recorded(
        self, key: tuple[Any, ...], queue: Callable[[], None]
    ) -> tuple[tuple[Any, ...], Callable[[], None]] | None:
        """Record a run as a CUDA graph; None where the engine does something in it that cannot be, which is said."""
        from rankbook.calibration.notes import note

        try:
            return key, self.memory.capture(queue)
        except (CheckFailedError, RuntimeError) as error:
            self._records = False
            note(f"{self.name}: steps cannot be recorded as a CUDA graph and are launched kernel by kernel ({error})")
            return None

    def keep_compiled(self) -> None:
        """Write what TensorRT-RTX compiled beside the engine; a folder that cannot be written to is said so."""
        if self._runtime_cache is None:
            return
        from rankbook.calibration.checkpoint.files import write_atomic
        from rankbook.calibration.notes import note

        held = bytes(memoryview(self._runtime_cache.serialize()))
        if self._cache_file.is_file() and self._cache_file.stat().st_size == len(held):
            return
        try:
            write_atomic(self._cache_file, held)
        except OSError as error:
            note(f"{self._cache_file} cannot be written ({error.strerror}): every run compiles its kernels again")

    def _make_context(self) -> Any:
        held = library(self._bindings)
        since = len(held.messages)
        strategies = getattr(self._bindings, "CudaGraphStrategy", None)
        # What `run` records has fixed shapes, which only a cache of fixed length gives.
        self._records = strategies is None and bool(self.aliased)
        if strategies is None:
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE
            self._runtime_cache = config.create_runtime_cache()
            if self._cache_file.is_file():  # one of another GPU or version is refused, and written anew
                self._runtime_cache.deserialize(self._cache_file.read_bytes())
            config.set_runtime_cache(self._runtime_cache)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._loader.explain(held.said(since))
        return context

    def _bounds(self, profile: int) -> dict[str, tuple[Shape, Shape]]:
        bounds = {}
        for name in self.inputs:
            low, _, high = self._engine.get_tensor_profile_shape(name, profile)
            bounds[name] = tuple(low), tuple(high)
        return bounds

    def _switch(self, profile: int) -> None:
        self._profile, self._shapes, self._places, self._graph, self._last = None, {}, {}, None, None
        self._must(self._context.set_optimization_profile_async(profile, self.memory.stream), f"profile {profile}")
        self.memory.finish()
        self._profile = profile

    def _set_shapes(self, shapes: Shapes) -> None:
        new = {name: shape for name, shape in shapes.items() if self._shapes.get(name) != shape}
        if not new:
            return
        self._graph = self._last = None
        for name, shape in new.items():
            self._shapes.pop(name, None)  # what is refused leaves none that is known
            self._must(self._context.set_input_shape(name, shape), f"the shape {_text(shape)} of {name}")
            self._shapes[name] = shape
        if missing := self._context.infer_shapes():
            raise CheckFailedError(f"{self.name}: the shapes of {', '.join(missing)} are not known; build it again")

    def _must(self, done: bool, what: str) -> None:
        if not done:
            held = library(self._bindings)
            reason = held.messages[-1] if held.messages else "no reason given"
            raise CheckFailedError(f"{self._bindings.__name__} refuses {what} of {self.name}: {reason}")


def _within(shape: Shape, low: Shape, high: Shape) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _place(array: Array) -> tuple[int, int]:
    return array.ctypes.data, array.nbytes


def _width(kind: str) -> int:
    import ml_dtypes  # noqa: F401  # makes bfloat16 a type of numpy
    import numpy as np

    return np.dtype(kind).itemsize


def _text(shape: Shape) -> str:
    return " x ".join(map(str, shape))
