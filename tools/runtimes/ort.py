"""ONNX Runtime: the exported file in a stock session, or with the native kernels in place of the bodies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind, Source
from rankbook.exporter.cache_names import is_state
from rankbook.exporter.options import NO_TOKEN
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.runtimes.base import NEXT_TOKEN, LanguageModel, Runtime, Setting, check_chosen
from rankbook.tools.runtimes.exported import FileModel
from rankbook.tools.runtimes.ort_memory import anchored, untouched
from rankbook.tools.runtimes.ort_steps import BoundSteps, Where

if TYPE_CHECKING:
    import numpy as np

    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.runtimes.base import Logits, Tokens

    Array = np.ndarray[Any, Any]

NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""Session configuration entry; with ``1`` a graph of which a node would run on the CPU beside the GPU is refused."""
_ROOM = 256
"""Positions beyond those needed in the buffer of a cache that grows in place."""


def unavailable() -> str | None:
    """Return why ONNX Runtime cannot be used on this machine, or None."""
    # onnxruntime-gpu installs the same module: either package serves.
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'rankbook[cpu]' (or 'rankbook[gpu]' for onnxruntime-gpu)"
    return None


def cuda_unavailable() -> str | None:
    """Return why ONNX Runtime cannot run the native kernels on a GPU of this machine, or None."""
    from rankbook.plugins.library import unavailable as library_unavailable
    from rankbook.tools.runtimes.trt import has_gpu

    if reason := unavailable() or library_unavailable("ort-cuda"):
        return reason
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA: pip uninstall onnxruntime, then pip install 'rankbook[gpu]'"
    return None if has_gpu() else "no NVIDIA driver with a GPU answers; run `rankbook doctor`, or leave native-cuda out"


def _has_exact_int8_products() -> bool:
    """Say whether ONNX Runtime's products of bytes are exact: without VNNI, pairs are added in 16 bits."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    return "avx2" not in flags or "vnni" in flags


def native_unavailable() -> str | None:
    """Return why ONNX Runtime cannot run the native library on the CPU, or None."""
    from rankbook.plugins.library import unavailable as library_unavailable

    return unavailable() or library_unavailable("ort")


def session(
    path: Path | bytes,
    *,
    threads: int | None = None,
    data_folder: Path | None = None,
    native: bool = False,
    cuda: bool = False,
    activations: str = "fp32",
    entries: Mapping[str, str] | None = None,
    exact_int8: bool = False,
) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU, or on a GPU.

    Args:
        path: The ``.onnx`` file, or a serialized model.
        threads: Threads within an operator; ONNX Runtime's choice when None.
        data_folder: Where the external data of a serialized model lies.
        native: Register the native kernels in place of the bodies.
        cuda: Run on the GPU what can run there.
        activations: What these compute with, see `rankbook.plugins.library.ACTIVATIONS`.
        entries: Further session configuration entries.
        exact_int8: Whether it has products of 8-bit activations, which must not saturate.

    Raises:
        MissingError: ONNX Runtime is not installed.
        UsageError: It refuses the file.
    """
    if reason := unavailable():
        raise MissingError(reason)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # A DequantizeLinear of 4 bits before a MatMul must not quantize the other factor as well, which is the default.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if threads:
        options.intra_op_num_threads = threads
    if data_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data_folder))
    if exact_int8 and not _has_exact_int8_products():
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # computes them in float32
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if native:
        from rankbook.plugins.library import ACTIVATIONS_ENTRY, library

        options.add_session_config_entry(ACTIVATIONS_ENTRY, activations)
        options.register_custom_ops_library(str(library("ort-cuda" if cuda else "ort")))
    providers = ["CUDAExecutionProvider"] if cuda else []
    if (entries or {}).get(NO_FALLBACK) != "1":  # ONNX Runtime refuses the entry where the CPU is named
        providers.append("CPUExecutionProvider")
    source = path if isinstance(path, bytes) else str(path)
    try:
        made = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # the library's own classes derive from Exception directly
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        name = "the graph" if isinstance(path, bytes) else path
        advice = "check the CUDA and cuDNN libraries that it needs, or export it again" if cuda else "export it again"
        raise UsageError(f"ONNX Runtime refuses {name}: {error}; {advice}") from None
    if cuda and "CUDAExecutionProvider" not in made.get_providers():  # it falls back to the CPU with a warning only
        raise MissingError(
            "ONNX Runtime could not start its CUDA provider: check the CUDA and cuDNN libraries it needs"
        )
    return made


class OrtModel(FileModel):
    """An exported file as a language model; the cache stays in ONNX Runtime's own tensors, where the session computes.

    Attributes:
        device: That place, ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        path: Path | ExportedModel,
        *,
        threads: int | None = None,
        kernels: str = "bodies",
        entries: Mapping[str, str] | None = None,
        graph: bytes | None = None,
    ) -> None:
        """Open a file or an exported folder.

        Args:
            path: The file or folder.
            threads: Threads within an operator; ONNX Runtime's choice when None.
            kernels: What computes packed layers: ``bodies``, ``native``, ``native-int8`` or ``native-cuda``.
            entries: Further session configuration entries.
            graph: A serialized model to run in place of the file's, with the data files beside it.

        Raises:
            UsageError: Not a file with ``input_ids`` and ``logits``.
            MissingError: ONNX Runtime or the native library is missing.
        """
        from rankbook.tools.runtimes import runtimes

        super().__init__(path)
        self.name = f"onnxruntime {self.file.path}"
        if self.file.metadata.dtype == "bf16":
            raise UsageError(
                f"{self.file.path} is bf16, which ONNX Runtime does not run on a CPU; export with --dtype fp32"
            )
        runtimes()[kernels].require()
        self._threads = threads
        self.kernels, self.native, self.cuda = kernels, kernels != "bodies", kernels == "native-cuda"
        self.device = "cuda" if self.cuda else "cpu"
        placed, folder = anchored(graph, self.file) if graph else (self.file.path, None)
        self._exact_int8 = self.file.metadata.activations not in ("none", "int8")
        self.session = session(
            placed,
            threads=threads,
            data_folder=folder,
            native=self.native,
            cuda=self.cuda,
            activations="int8" if kernels == "native-int8" else "fp32",
            entries=entries,
            exact_int8=self._exact_int8,
        )
        self._held, self._spoiled = 0, False
        self._steps: dict[str, BoundSteps] = {}
        # New keys and values are written behind the old ones, in the same buffer: one that grows, or of a fixed length.
        # Only states change places.
        self._fixed = int(self.file.metadata.max_context or 0)
        self._in_place = self.file.metadata.in_place

    def open_graph(self, graph: bytes) -> Any:
        """Return a session of another graph, with the same kernels and the data files of this one."""
        placed, folder = anchored(graph, self.file)
        return session(
            placed,
            threads=self._threads,
            data_folder=folder,
            native=self.native,
            cuda=self.cuda,
            exact_int8=self._exact_int8,
        )

    def run_graph(self, graph: bytes, outputs: Mapping[str, str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute a graph in a session of its own."""
        results = self.open_graph(graph).run(list(outputs.values()), dict(feeds))
        return dict(zip(outputs, results, strict=True))

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length or 1, vocabulary)."""
        if not self._fixed:
            return super().scores(tokens)
        self._reset(tokens.shape[0])
        self._reserve(tokens.shape[1])
        scores: Logits = self._run_in_place(tokens, "logits").astype("float32")  # a copy: the next call writes there
        return scores

    def start_best(self, rows: Sequence[Tokens]) -> Tokens:
        """Begin several texts; return the best next token of each, which the graph chooses where it can."""
        import numpy as np

        if NEXT_TOKEN not in self.file.outputs:
            return super().start_best(rows)
        self._check_rows(rows)
        self._reset(len(rows))
        return self._choose(np.stack(rows))

    def step_best(self, tokens: Sequence[int]) -> Tokens:
        """Continue every text with one token; return the best next one of each, see `start_best`."""
        if NEXT_TOKEN not in self.file.outputs:
            return super().step_best(tokens)
        return self._choose(self._next(tokens))

    def _choose(self, tokens: Tokens) -> Tokens:
        self._reserve(self._length + tokens.shape[1])
        best: Tokens = self._run_in_place(tokens, NEXT_TOKEN)[:, 0].copy()  # the next call writes there
        self._length += tokens.shape[1]
        return check_chosen(best)

    def _reset(self, batch: int) -> None:
        import numpy as np

        kept = self._fixed and self._cache and not self._spoiled
        if kept and next(iter(self._cache.values())).shape()[0] == batch:
            self._length = 0  # no query sees what another text left in the buffers; a state would go on
            for name in filter(is_state, self._cache):
                value = self._cache[name]
                value.update_inplace(np.zeros(value.shape(), self._types[name]))
            return
        super()._reset(batch)
        self._held, self._steps, self._spoiled = self._fixed, {}, False
        self._cache = {name: self._placed(value) for name, value in self._cache.items()}

    def _advance(self, tokens: Tokens) -> Logits:
        if not self._in_place:
            return super()._advance(tokens)
        self._reserve(self._length + tokens.shape[1])
        return self._last(tokens, self._run_in_place(tokens, "logits"))

    def _reserve(self, positions: int) -> None:
        """Make the buffers of the cache hold so many positions; they double, so that copies are rare."""
        self._check_slots(positions)
        if positions <= self._held:
            return
        held, cache = max(positions + _ROOM, 2 * self._held), dict(self._cache)
        for name, value in self._cache.items():
            if is_state(name):
                continue
            batch, heads, _, size = value.shape()
            wide = untouched((batch, heads, held, size), self._types[name])
            wide[:, :, : self._length] = value.numpy()[:, :, : self._length]
            cache[name] = self._placed(wide)
        self._held, self._steps, self._cache = held, {}, cache  # all of them, or none where memory ends

    def _placed(self, values: Array) -> Any:
        """Return an array as an OrtValue on the device."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(values, self.device)

    def _compute(self, tokens: Tokens, outputs: Collection[str]) -> dict[str, Any]:
        """The cache goes in and out where it lies, since it is most of what a step moves; logits come to the host."""
        binding = self.session.io_binding()
        for name, value in self._inputs(tokens).items():
            binding.bind_cpu_input(name, value)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self.device)
        self.session.run_with_iobinding(binding)
        values = dict(zip(outputs, binding.get_outputs(), strict=True))
        return values | {"logits": values["logits"].numpy()}

    def _run_in_place(self, tokens: Tokens, wanted: str) -> Any:
        """Compute an output; keys and values are written into the buffers of the cache."""
        import numpy as np

        self._check_known(tokens)
        if wanted not in self._steps:
            where = Where(self.session, self.device, self._types)
            self._steps[wanted] = BoundSteps(where, self._cache, self._held, wanted)
        found = self._steps[wanted].run(tokens, self._length)
        # What made them NaN may be in the cache: a mask multiplies it by 0, which is NaN in the next text too.
        self._spoiled |= bool((found == NO_TOKEN).any() if wanted == NEXT_TOKEN else np.isnan(found[..., 0]).any())
        return found


def model_entries(setting: Setting) -> dict[str, str]:
    """Return the session configuration entries of a setting."""
    return {"session.force_spinning_stop": "1"} if setting.shared else {}


def prepare(source: Source) -> None:
    """Import ONNX Runtime and read what the file says about itself."""
    import onnxruntime  # noqa: F401

    from rankbook.exporter.file import ExportedModel

    ExportedModel.open(source.path)


def version_name() -> str:
    """Return the version of ONNX Runtime, with a warning where its two packages overwrite each other."""
    from importlib.metadata import distributions

    found = [item.version for name in ("onnxruntime-gpu", "onnxruntime") for item in distributions(name=name)]
    both = " (onnxruntime and onnxruntime-gpu side by side overwrite each other: uninstall one)"
    return next(iter(found), "") + (both if len(found) > 1 else "")


def _library_name(library: str) -> str:
    from rankbook.plugins.library import library as path
    from rankbook.plugins.library import native_info

    info = native_info(library)
    sets = f" (fp32: {info['isa']}, int8 activations: {info['isa_int8']})" if library == "ort" else ""
    return f"{path(library)}{sets}"


def _runtime(
    name: str, enables: str, unavailable: Callable[[], str | None], version: Callable[[], str], **more: Any
) -> Runtime:
    def open_file(file: Path | ExportedModel, setting: Setting) -> FileModel:
        return OrtModel(file, threads=setting.threads, kernels=name, entries=model_entries(setting))

    def open_source(source: Source, setting: Setting) -> LanguageModel:
        return open_file(source.path, setting)

    title = "onnxruntime" if name == "bodies" else f"onnxruntime, {name}"
    kinds = frozenset({Kind.ONNX})
    more |= {"open": open_source, "open_file": open_file, "prepare": prepare}
    return Runtime(name, title, enables, unavailable, version, kinds, **more)


RUNTIMES = (
    _runtime(
        "native", "faster generate, eval and serve", native_unavailable, lambda: _library_name("ort"), automatic=True
    ),
    _runtime(
        "bodies",
        "eval, parity, generate: the standard operators in the file",
        unavailable,
        version_name,
        automatic=True,
    ),
    _runtime(
        "native-int8",
        "the fastest generate: activations are rounded to 8 bits inside (`rankbook.plugins.int8`)",
        native_unavailable,
        lambda: _library_name("ort"),
        exact=False,
    ),
    _runtime(
        "native-cuda",
        "generate, eval, parity and bench with the native operators on an NVIDIA GPU",
        cuda_unavailable,
        lambda: _library_name("ort-cuda"),
        cuda=True,
    ),
)
