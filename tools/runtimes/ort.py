"""ONNX Runtime: the exported file in a stock session, or with the native kernels in place of the bodies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind, Source
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.generation.settings import read_json, read_settings
from rankbook.tools.inspect.sizes import packed_size
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting
from rankbook.tools.runtimes.ort_memory import anchored, untouched

if TYPE_CHECKING:
    import numpy as np

    from rankbook.exporter.file import ExportedModel
    from rankbook.tools.runtimes.base import Logits, Tokens
    from rankbook.tools.runtimes.ort_steps import BoundSteps

NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""Session configuration entry; with ``1`` a graph of which a node would run on the CPU beside the GPU is refused."""
_ROOM = 256
"""Positions beyond those needed in the buffer of a cache that grows in place."""

_NUMPY = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
}


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


class OrtModel(LanguageModel):
    """An exported file as a language model; the cache stays in ONNX Runtime's own tensors between steps."""

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
        from rankbook.exporter.file import ExportedModel
        from rankbook.tools.runtimes import runtimes

        self.file = path if isinstance(path, ExportedModel) else ExportedModel.open(path)
        self.name = f"onnxruntime {self.file.path}"
        if "input_ids" not in self.file.inputs or "logits" not in self.file.outputs:
            raise UsageError(
                f"{self.file.path} has no input_ids and logits, so it cannot be given text; give a file written by"
                " `rankbook export` (with --inputs ids)"
            )
        if self.file.metadata.dtype == "bf16":
            raise UsageError(
                f"{self.file.path} is bf16, which ONNX Runtime does not run on a CPU; export with --dtype fp32"
            )
        runtimes()[kernels].require()
        self._threads = threads
        self.kernels, self.native, self.cuda = kernels, kernels != "bodies", kernels == "native-cuda"
        placed, folder = anchored(graph, self.file) if graph else (self.file.path, None)
        self.session = session(
            placed,
            threads=threads,
            data_folder=folder,
            native=self.native,
            cuda=self.cuda,
            activations="int8" if kernels == "native-int8" else "fp32",
            entries=entries,
        )
        self._types = {item.name: _NUMPY[item.type] for item in self.session.get_inputs()}
        self._outputs = [item.name for item in self.session.get_outputs()]
        self._cache: dict[str, Any] = {}
        self._length = self._held = 0
        self._steps: BoundSteps | None = None
        # ONNX Runtime's attention writes new keys and values behind the old ones, in the same buffer.
        self._in_place = self.file.metadata.graph == "ort"

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the file, or None; read when it is asked for, since transformers loads for seconds."""
        from rankbook.calibration.model.tokenizer import read_tokenizer

        return read_tokenizer(str(self.file.path.parent))

    @cached_property
    def context(self) -> int | None:
        """What the file says; for files that do not, the configuration beside them."""
        folder = self.file.path.parent
        noted = self.file.metadata.context
        value = noted if noted.isdecimal() else read_json(folder / "config.json").get("max_position_embeddings")
        return int(value) if value else None

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """That of the folder."""
        return read_settings(self.file.path.parent)

    @cached_property
    def packed(self) -> tuple[int, int]:
        """Of operators of this project and of MatMulNBits."""
        return packed_size(self.file)

    @property
    def file_bytes(self) -> int:
        """The graph and its data files."""
        return self.file.file_bytes

    @property
    def last_only(self) -> bool:
        """Whether the file gives the logits of the last position only."""
        return self.file.metadata.logits == "last"

    def scores(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length or 1, vocabulary)."""
        self._reset(tokens.shape[0])
        scores: Logits = self._run(tokens, ["logits"])["logits"].numpy().astype("float32", copy=False)
        return scores

    def open_graph(self, graph: bytes) -> Any:
        """Return a session of another graph, with the same kernels and the data files of this one."""
        placed, folder = anchored(graph, self.file)
        return session(placed, threads=self._threads, data_folder=folder, native=self.native, cuda=self.cuda)

    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""
        self._reset(tokens.shape[0])
        return self._advance(tokens)

    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,)."""
        import numpy as np

        return self._advance(np.array([[token]], np.int64))

    def feeds(self, tokens: Tokens) -> dict[str, np.ndarray[Any, Any]]:
        """Return the inputs of one call without a cache, by name, as numpy arrays."""
        self._reset(tokens.shape[0])
        return self._inputs(tokens) | {name: value.numpy() for name, value in self._cache.items()}

    def _reset(self, batch: int) -> None:
        """An empty cache: tensors without a past."""
        import numpy as np
        from onnxruntime import OrtValue

        self._length = self._held = 0
        self._cache, self._steps = {}, None
        for name, shape in self.file.inputs.items():
            if name.startswith("past_key_values"):
                sizes = [
                    batch if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(shape)
                ]
                self._cache[name] = OrtValue.ortvalue_from_numpy(np.zeros(sizes, self._types[name]))

    def _advance(self, tokens: Tokens) -> Logits:
        if self._in_place:
            self._reserve(self._length + tokens.shape[1])
            scores = self._run_in_place(tokens)
        else:
            values = self._run(tokens, self._outputs)
            self._cache = {_past(name): value for name, value in values.items() if name.startswith("present")}
            scores = values["logits"].numpy()
        self._length += tokens.shape[1]
        last: Logits = scores[0, -1].astype("float32")  # a copy: the next step writes there
        return last

    def _reserve(self, positions: int) -> None:
        """Make the buffers of the cache hold so many positions; they double, so that copies are rare."""
        from onnxruntime import OrtValue

        if positions <= self._held:
            return
        self._held, self._steps = max(positions + _ROOM, 2 * self._held), None
        for name, value in self._cache.items():
            batch, heads, _, size = value.shape()
            wide = untouched((batch, heads, self._held, size), self._types[name])
            wide[:, :, : self._length] = value.numpy()[:, :, : self._length]
            self._cache[name] = OrtValue.ortvalue_from_numpy(wide)

    def _run(self, tokens: Tokens, outputs: list[str]) -> dict[str, Any]:
        """Compute outputs by name; OrtValues go in and out, since the cache is most of what a step moves."""
        from onnxruntime import OrtValue

        feeds = {name: OrtValue.ortvalue_from_numpy(value) for name, value in self._inputs(tokens).items()}
        return dict(zip(outputs, self.session.run_with_ort_values(outputs, feeds | self._cache), strict=True))

    def _run_in_place(self, tokens: Tokens) -> Any:
        """Compute the logits; keys and values are written into the buffers of the cache."""
        steps = self._steps
        if steps is None:
            from rankbook.tools.runtimes.ort_steps import BoundSteps

            outputs = {_past(name): name for name in self._outputs if name.startswith("present")}
            buffers = {name: (outputs[name], value) for name, value in self._cache.items()}
            steps = BoundSteps(self.session, buffers, self._types)
        # For a GPU, what is bound is copied there at that moment: such a binding serves one call.
        self._steps = None if self.cuda else steps
        return steps.run(tokens, self._length)

    def _inputs(self, tokens: Tokens) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        batch, length = tokens.shape
        inputs: dict[str, np.ndarray[Any, Any]] = {}
        for name in ("input_ids", "attention_mask", "position_ids"):
            if name in self._types:
                size = self._length + length if name == "attention_mask" else length
                inputs[name] = np.ones((batch, size), self._types[name])
        inputs["input_ids"][:] = tokens
        if "position_ids" in inputs:
            inputs["position_ids"][:] = np.arange(self._length, self._length + length)
        return inputs


def _past(present: str) -> str:
    """Return the name of the cache input that an output of the last step becomes."""
    return present.replace("present", "past_key_values", 1)


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
    def open_file(source: Source, setting: Setting) -> LanguageModel:
        return OrtModel(source.path, threads=setting.threads, kernels=name, entries=model_entries(setting))

    title = "onnxruntime" if name == "bodies" else f"onnxruntime, {name}"
    kinds = frozenset({Kind.ONNX})
    return Runtime(name, title, enables, unavailable, version, kinds, open=open_file, prepare=prepare, **more)


RUNTIMES = (
    _runtime("native", "faster generate and eval", native_unavailable, lambda: _library_name("ort"), automatic=True),
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
        "the native operators on an NVIDIA GPU",
        cuda_unavailable,
        lambda: _library_name("ort-cuda"),
        cuda=True,
    ),
)
