"""Loads an engine of TensorRT or TensorRT-RTX, and says in one sentence why it cannot be."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.tools.errors import CheckFailedError, CommandError, MissingError, UsageError
from rankbook.tools.runtimes.trt import RTX_CAPABILITIES

if TYPE_CHECKING:
    from rankbook.tools.deploy.manifest import Manifest
    from rankbook.tools.runtimes.trt_memory import DeviceMemory

_READ = 64 << 20
"""Most bytes that the stream reader hands over at once: the engine is never in host memory as a whole."""

_OTHER_VERSION = ("version tag", "library version", "different version", "serialization version", "magic tag")
_OTHER_GPU = ("incompatible device", "different device", "compute capability", "unsupported sm")
_NO_PLUGIN = ("plugin creator", "could not find plugin", "getplugincreator")
_OLD_DRIVER = ("driver version is insufficient",)
_NO_MEMORY = ("out of memory", "outofmemory", "cudamalloc", "failed to allocate")
"""What the libraries say, in lower case, by what is wrong."""


@dataclass
class Library:
    """One of the two libraries in this process; the first logger of a process is the only one that it asks.

    Attributes:
        bindings: The module ``tensorrt`` or ``tensorrt_rtx``.
        messages: Errors that it reported, oldest first.
        plugins: The plugin library that was registered, or None.
        holding: Whether an engine that holds the plugin library was loaded.
    """

    bindings: Any
    messages: list[str] = field(default_factory=list)
    plugins: Path | None = None
    holding: bool = False

    def __post_init__(self) -> None:
        bindings, messages = self.bindings, self.messages

        class Logger(bindings.ILogger):  # type: ignore[misc, name-defined]
            """Keeps errors."""

            def __init__(self) -> None:
                bindings.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                """Called by the library."""
                if severity <= bindings.ILogger.ERROR:
                    messages.append(msg)

        self.logger = Logger()

    def said(self, since: int) -> str:
        """Return the errors reported behind the first ``since`` ones, as one line."""
        return "; ".join(dict.fromkeys(self.messages[since:])) or "no reason given"


@functools.cache
def library(bindings: Any) -> Library:
    """Return what this process knows of a library."""
    return Library(bindings)


def reader(bindings: Any, path: Path) -> Any:
    """Return a stream reader of a file for ``deserialize_cuda_engine``; close its ``file``."""

    class FileReader(bindings.IStreamReaderV2):  # type: ignore[misc]
        """Reads pieces of the file."""

        def __init__(self) -> None:
            bindings.IStreamReaderV2.__init__(self)
            self.file = path.open("rb")

        def read(self, num_bytes: int, stream: int) -> bytes:  # noqa: ARG002
            """Called by the library, again for what is left of a large piece."""
            return self.file.read(min(num_bytes, _READ))

        def seek(self, offset: int, where: Any) -> bool:
            """Called by the library."""
            position = bindings.SeekPosition
            origins = {position.SET: io.SEEK_SET, position.CUR: io.SEEK_CUR, position.END: io.SEEK_END}
            self.file.seek(offset, origins[where])
            return True

    return FileReader()


@dataclass(frozen=True)
class Loader:
    """What is needed to load one engine."""

    manifest: Manifest
    bindings: Any
    memory: DeviceMemory

    def load(self) -> tuple[Any, Any]:
        """Return the runtime, which must live as long as the engine, and the engine.

        Raises:
            UsageError: The engine is for another GPU or of another version, or does not fit the memory.
            MissingError: The driver is too old, or the plugin library is missing.
            CheckFailedError: The library refuses it for another reason.
        """
        self._check_gpu()
        self._bring_plugins()
        held = library(self.bindings)
        since = len(held.messages)
        try:
            runtime = self.bindings.Runtime(held.logger)
        except TypeError:  # what the bindings make of a null pointer
            runtime = None
        if runtime is None:
            raise self.explain(held.said(since))
        runtime.engine_host_code_allowed = bool(self.manifest.facts.get("self_contained"))
        source = reader(self.bindings, self.manifest.engine)
        try:
            engine = runtime.deserialize_cuda_engine(source)
        finally:
            source.file.close()
        if engine is None:
            raise self.explain(held.said(since))
        return runtime, engine

    def _check_gpu(self) -> None:
        wanted = self.manifest.facts.get("capabilities") or ()
        if wanted and self.memory.capability not in wanted:
            raise self._other_gpu()

    def _bring_plugins(self) -> None:
        """Register the plugin library, unless the engine holds it; in one process only one of both is possible."""
        from rankbook.plugins import library as files

        held, facts = library(self.bindings), self.manifest.facts
        contained = bool(facts.get("self_contained"))
        if (contained and held.plugins) or (self.manifest.needs_library and held.holding):
            raise UsageError(
                f"{self.manifest.folder} {'holds' if contained else 'needs'} the plugin library, which another engine"
                f" of this process {'loaded from its file' if contained else 'brought along'}; run the two one by one"
            )
        held.holding |= contained
        if not self.manifest.needs_library or held.plugins:
            return
        if reason := files.unavailable("trt"):
            raise MissingError(
                f"{self.manifest.folder} has {facts['plugin_layers']} layers of the plugin library, and {reason};"
                " or build the engine with --no-plugins or --self-contained"
            )
        path = files.library("trt")
        if self.bindings.get_plugin_registry().load_library(str(path)) is None:
            raise CheckFailedError(f"{self.bindings.__name__} refuses the plugin library {path}; build it again")
        held.plugins = path

    def explain(self, said: str) -> CommandError:
        """Return the error for what the library said when it refused something."""
        folder, facts, words = self.manifest.folder, self.manifest.facts, said.lower()
        mine, built = self.bindings.__version__, facts.get("version", "")

        def about(patterns: tuple[str, ...]) -> bool:
            return any(pattern in words for pattern in patterns)

        if about(_OLD_DRIVER):
            return MissingError(old_driver(self.bindings))
        if about(_NO_MEMORY):
            return self.too_large(0, said=said)
        if about(_OTHER_GPU):
            return self._other_gpu()
        if about(_OTHER_VERSION) or built != mine:
            return UsageError(
                f"{folder} was built by {self.bindings.__name__} {built} and {mine} is installed, which does not load"
                f" it ({said}); build it again, or install {built}"
            )
        if about(_NO_PLUGIN):
            return MissingError(
                f"the plugin library on this machine lacks an operator of {folder} ({said}); build the library and"
                " the engine from the same version of rankbook (`make native-cuda`, `rankbook build`)"
            )
        return CheckFailedError(f"{self.bindings.__name__} does not load {folder}: {said}")

    def _other_gpu(self) -> UsageError:
        facts, memory = self.manifest.facts, self.memory
        if facts.get("target") == "rtx":
            advice = f"build one with `rankbook build --compute-capability {memory.capability}`"
            if memory.capability not in RTX_CAPABILITIES:
                advice = "TensorRT-RTX builds none for this GPU: build one on it with `rankbook build --target trt`"
            what = f"is for {' and '.join(facts.get('capabilities', ()))}; {advice}"
        else:
            what = "is for another GPU; TensorRT builds for the GPU it runs on: build it here with `rankbook build`"
        return UsageError(f"{memory.device} is {memory.capability} and {self.manifest.folder} {what}")

    def too_large(self, needed: int, caches: int = 0, said: str = "") -> UsageError:
        """Return the error for an engine that does not fit.

        Args:
            needed: Bytes of tensors that were to be taken; 0 where the library itself found no room.
            caches: How many of them belong to the cache.
            said: What the library said.
        """
        free, total = self.memory.room()
        folder, profiles = self.manifest.folder, self.manifest.facts["profiles"].values()
        size = f"needs {needed / 1e9:.2f} GB for its tensors" if needed else f"does not fit ({said})"
        held = f"{self.memory.device} has {free / 1e9:.2f} of {total / 1e9:.2f} GB free"
        batch, tokens = (max(shapes["input_ids"][2][axis] for shapes in profiles) for axis in (0, 1))
        share = (free - needed + caches) / caches if caches else 0.0
        fits = f" at most {100 * share:.0f} % of its --max-batch times --max-context would fit;" if share > 0 else ""
        return UsageError(
            f"{folder} {size} and {held};{fits} end other programs, or build it with less than --max-batch {batch},"
            f" --max-sequence {tokens} or with a shorter --max-context"
        )


def old_driver(bindings: Any) -> str:
    """Return the sentence for a driver that is older than the library."""
    from rankbook.tools.runtimes.trt import driver_version

    return (
        f"the NVIDIA driver on this machine serves CUDA {driver_version() or 'of no version'}, which is too old for"
        f" {bindings.__name__} {bindings.__version__}; update the driver"
    )
