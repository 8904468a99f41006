"""The classes of ``tensorrt`` and ``tensorrt_rtx``: names, methods and arguments, and nothing else that is public."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from rankbook.calibration.source import ENGINE_MANIFEST
from rankbook.tools.runtimes import ort
from tests.tensorrt_stand_in.memory import HostMemory, streams


class _OfLibrary:
    """A class of one of the two libraries."""

    _library: State


class Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TensorIOMode(IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class SeekPosition(IntEnum):
    SET, CUR, END = range(3)


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DataType(IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


_TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "int8": DataType.INT8,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "bool": DataType.BOOL,
}


_NUMPY = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_NUMPY |= {f"tensor({name})": name for name in ("int8", "int32", "int64", "bool")}


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity
    Severity = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class IStreamReaderV2:
    def read(self, num_bytes: int, stream: int) -> bytes:
        raise NotImplementedError

    def seek(self, offset: int, where: SeekPosition) -> bool:
        raise NotImplementedError


class IPluginRegistry(_OfLibrary):
    def load_library(self, plugin_path: str) -> Any:
        state = self._library
        if plugin_path in state.plugins:
            return None
        state.plugins.append(plugin_path)
        return object()


class Runtime(_OfLibrary):
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        self.engine_host_code_allowed = False
        self.logger = logger
        state = self._library
        if state.broken:
            logger.log(Severity.ERROR, state.broken)
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, stream_reader_v2: IStreamReaderV2) -> ICudaEngine | None:
        state = self._library
        # Bytes come in pieces as large as the reader likes; the library looks at the beginning first.
        reader = stream_reader_v2
        assert isinstance(reader, IStreamReaderV2)
        assert reader.read(4, 0)
        assert reader.seek(0, SeekPosition.SET)
        digest, pieces = hashlib.sha256(), iter(lambda: reader.read(1 << 62, 0), b"")
        for piece in pieces:
            digest.update(piece)
        folder = state.find(digest.hexdigest())
        facts = json.loads((folder / ENGINE_MANIFEST).read_text())
        if reason := state.refusal or self._refusal(state, facts):
            self.logger.log(Severity.ERROR, reason)
            return None
        engine = ICudaEngine.__new__(ICudaEngine)
        engine._open(folder, facts, self)
        return engine

    def _refusal(self, state: State, facts: dict[str, Any]) -> str:
        contained, loaded = facts["self_contained"], bool(state.plugins)
        if contained:
            assert not loaded, "the library of the engine is loaded already"
            return "" if self.engine_host_code_allowed else "the engine holds host code, which is not allowed"
        return "" if loaded or not facts["plugin_layers"] else "could not find plugin CodebookMatMul3"


class ICudaEngine:
    def _open(self, folder: Path, facts: dict[str, Any], runtime: Runtime) -> None:
        import onnx

        self._runtime = runtime  # which must outlive it
        self._profiles = list(facts["profiles"].values())
        path = folder / facts["source"]["path"]
        data = runtime._library.data
        self._session = ort.session(path.read_bytes() if data else path, data_folder=data)
        graph = onnx.load(path, load_external_data=False).graph
        self._sizes = {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        ports = (*self._session.get_inputs(), *self._session.get_outputs())
        self._kinds = {port.name: _NUMPY[port.type] for port in ports}
        self._inputs = [port.name for port in self._session.get_inputs()]
        self._outputs = [port.name for port in self._session.get_outputs()]
        self._aliases = {
            node.output[0]: node.input[0]
            for node in graph.node
            if node.op_type == "TensorScatter" and node.output[0] in self._outputs and node.input[0] in self._inputs
        }
        self._state = runtime._library
        self._aliases = {} if self._state.copies else self._aliases

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return 4096

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[self._kinds[name]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert name in self._inputs, "only inputs have profiles"
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._aliases.get(name)

    def create_runtime_config(self) -> IRuntimeConfig:
        config = IRuntimeConfig.__new__(IRuntimeConfig)
        config.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        config._cache = None
        config._state = self._state
        return config

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext | None:
        self._state.configs.append(runtime_config)
        if self._state.no_context:
            self._runtime.logger.log(Severity.ERROR, self._state.no_context)
            return None
        context = IExecutionContext.__new__(IExecutionContext)
        context._open(self)
        return context


class IRuntimeConfig:
    cuda_graph_strategy: CudaGraphStrategy
    _cache: IRuntimeCache | None
    _state: State

    def create_runtime_cache(self) -> IRuntimeCache:
        cache = IRuntimeCache.__new__(IRuntimeCache)
        cache._held = b""
        cache._state = self._state
        return cache

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    _held: bytes
    _state: State

    def serialize(self) -> memoryview:
        return memoryview(b"compiled on a stand-in")

    def deserialize(self, blob: bytes) -> bool:
        self._held = bytes(blob)
        self._state.caches.append(self._held)
        return True


class IExecutionContext:
    def _open(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm = False  # something ran since the last change

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        memory = streams[stream_handle]
        idle = not memory.queue and not memory.recording
        assert idle, "work of the other profile is not done"
        self._profile, self._shapes, self._addresses, self._warm = profile_index, {}, {}, False
        return 0 <= profile_index < len(self._engine._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "the profile comes before the shapes"
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if len(shape) != len(low) or not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            self._say(f"{name}: {shape} is not within {low} and {high}")
            return False
        self._shapes[name], self._warm = tuple(shape), False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert self._profile is not None, "the profile comes before the addresses"
        assert name in self._engine._kinds
        self._addresses[name], self._warm = memory, False
        return True

    def infer_shapes(self) -> list[str]:
        missing = [name for name in self._engine._inputs if name not in self._shapes]
        if not missing:
            self._dimensions()
        return missing

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._engine._inputs:
            return self._shapes[name]
        known = self._dimensions()
        shape = tuple(_evaluate(size, known) for size in self._engine._sizes[name])
        assert min(shape) >= 0, f"the shape of {name} is not known before those of the inputs are"
        return shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert not self.infer_shapes(), "a shape is missing"
        memory, engine = streams[stream_handle], self._engine
        assert set(self._addresses) == set(engine._kinds), "an address is missing"
        for output, source in engine._aliases.items():
            assert self._addresses[output] == self._addresses[source], f"{output} must lie where {source} lies"
        assert self._warm or not memory.recording, "the first run of a shape cannot be recorded"
        if memory.recording and engine._state.waits:
            self._say("operation not permitted when stream is capturing")
            return False
        places = {
            name: (self._addresses[name], self.get_tensor_shape(name), np.dtype(kind))
            for name, kind in engine._kinds.items()
        }
        sizes = {name: int(np.prod(shape)) * kind.itemsize for name, (_, shape, kind) in places.items()}
        for name, (address, _, _) in places.items():
            memory.check_live(address, sizes[name])
        _check_apart(places, sizes, engine._aliases)
        memory.push(lambda: _execute(engine, memory, places, sizes))
        self._warm = True
        return True

    def _dimensions(self) -> dict[str, int]:
        """Value of every named dimension; two inputs that contradict each other are an error, as in the library."""
        known: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for dimension, size in zip(self._engine._sizes[name], shape, strict=True):
                if isinstance(dimension, int):
                    assert dimension == size, f"{name} has {dimension} there"
                elif known.setdefault(dimension, size) != size:
                    raise RuntimeError(f"{dimension} is {known[dimension]} and {size}")
        total, past = known.get("total_sequence"), known.get("past_sequence")  # of states alone nothing is known
        if total is not None and past is not None and total != past + known["sequence"]:
            raise RuntimeError(f"past and new tokens do not make the total: {known}")
        return known

    def _say(self, text: str) -> None:
        self._engine._runtime.logger.log(Severity.ERROR, text)


def _evaluate(size: Any, known: dict[str, int]) -> int:
    """A dimension such as ``past_sequence + sequence``."""
    if isinstance(size, int):
        return size
    parts = [part.strip() for part in size.split("+")]
    return sum(int(part) if part.isdecimal() else known.get(part, -(1 << 40)) for part in parts)


def _check_apart(places: dict[str, Any], sizes: dict[str, int], aliases: dict[str, str]) -> None:
    """No two tensors share memory but those that are meant to."""
    spans = sorted((places[name][0], places[name][0] + size, name) for name, size in sizes.items() if size)
    for (_, end, name), (start, _, other) in itertools.pairwise(spans):
        assert end <= start or aliases.get(name) == other or aliases.get(other) == name, f"{name} and {other} overlap"


def _execute(engine: ICudaEngine, memory: HostMemory, places: dict[str, Any], sizes: dict[str, int]) -> None:
    views = {}
    for name, (address, shape, kind) in places.items():
        memory.check_live(address, sizes[name])
        raw: Any = (ctypes.c_char * max(1, sizes[name])).from_address(address)
        views[name] = np.frombuffer(raw, kind, count=int(np.prod(shape))).reshape(shape)
    results = engine._session.run(engine._outputs, {name: views[name] for name in engine._inputs})
    engine._state.runs += 1
    for name, value in zip(engine._outputs, results, strict=True):
        assert value.shape == views[name].shape, (name, value.shape, views[name].shape)
        views[name].flags.writeable = True
        views[name][...] = value


@dataclass
class State:
    """What one library has seen, and how it is to behave.

    Attributes:
        module: The library.
        memory: The device.
        folders: Engine folders that exist.
        roots: Folders below which further ones may lie.
        copies: The library writes no output into the memory of an input.
        data: Where the weights lie that engines really hold, if not in the file that they were built from.
        refusal: The library refuses every engine with this message.
        broken: There is no runtime, with this message.
        no_context: There is no context, with this message.
        waits: Engines wait in the middle of a run, which no CUDA graph can hold.
        configs: Runtime configurations of contexts that were made; None for none.
        caches: Runtime caches that were read.
        plugins: Plugin libraries that were loaded.
        runs: How often an engine ran.
    """

    module: ModuleType
    memory: HostMemory
    folders: list[Path] = field(default_factory=list)
    roots: list[Path] = field(default_factory=list)
    copies: bool = False
    data: Path | None = None
    refusal: str = ""
    broken: str = ""
    no_context: str = ""
    waits: bool = False
    configs: list[Any] = field(default_factory=list)
    caches: list[bytes] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    runs: int = 0

    def find(self, digest: str) -> Path:
        """Return the folder whose manifest names this engine."""
        for folder in (*self.folders, *(path.parent for root in self.roots for path in root.rglob(ENGINE_MANIFEST))):
            if json.loads((folder / ENGINE_MANIFEST).read_text())["engine_sha256"] == digest:
                return folder
        raise AssertionError("no folder holds this engine")
