"""llama.cpp through its C interface in llama-cpp-python, with llama.cpp's own defaults.

``python -m rankbook.tools.runtimes.llamacpp FROM.gguf Q4_0 TO.gguf`` writes a file in another type of weights.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.source import Kind
from rankbook.tools.errors import MISSING, OK, USAGE, CheckFailedError, UsageError
from rankbook.tools.runtimes.base import LanguageModel, Runtime, Setting

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens

TYPES = ("F16", "Q8_0", "Q4_0")
"""Types of weights that `requantize` writes."""
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""Takes what llama.cpp says about every tensor; it must live as long as the library."""


def unavailable() -> str | None:
    """Return why it cannot be used on this machine, or None."""
    return None if find_spec("llama_cpp") else "llama.cpp is missing: pip install llama-cpp-python (it compiles)"


class LlamaCppModel(LanguageModel):
    """A ``.gguf`` file."""

    def __init__(self, path: Path, setting: Setting) -> None:
        """Open it.

        Raises:
            UsageError: llama.cpp cannot read it.
        """
        self._library = _library()
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise UsageError(f"llama.cpp cannot read {path}; give a .gguf file of a model that it knows")
        parameters = self._library.llama_context_default_params()
        capacity = self._capacity = setting.capacity or self._library.llama_model_n_ctx_train(self._model)
        parameters.n_ctx = capacity
        parameters.n_batch = max(parameters.n_batch, capacity)
        parameters.n_threads = parameters.n_threads_batch = setting.threads or len(os.sched_getaffinity(0))
        self._context = self._library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise UsageError(f"llama.cpp cannot make a context of {capacity} tokens for {path}")
        self._words = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._scores: tuple[int, Any] = (0, None)
        self._path = path
        self.name = f"llama.cpp {path}"
        self.kernels = f"llama-cpp-python {version('llama-cpp-python')}"

    @property
    def file_bytes(self) -> int:
        """The file."""
        return self._path.stat().st_size

    @property
    def packed(self) -> tuple[int, int]:
        """Of everything."""
        return self._library.llama_model_size(self._model), self._library.llama_model_n_params(self._model)

    @property
    def context(self) -> int | None:
        """The capacity that it was opened with."""
        return self._capacity

    def start(self, tokens: Tokens) -> Logits:
        """Begin with tokens (1, length)."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        return self._advance(tokens[0].tolist())

    def step(self, token: int) -> Logits:
        """Continue with one token."""
        return self._advance([token])

    def _advance(self, tokens: Sequence[int]) -> Logits:
        import numpy as np

        held = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch points into it
        if status := self._library.llama_decode(self._context, self._library.llama_batch_get_one(held, len(tokens))):
            raise CheckFailedError(f"llama.cpp could not decode {len(tokens)} tokens: status {status}")
        scores = self._library.llama_get_logits_ith(self._context, -1)
        address = ctypes.addressof(scores.contents)
        if address != self._scores[0]:  # an array is made once: it takes one percent of a step
            self._scores = (address, np.ctypeslib.as_array(scores, (self._words,)))
        last: Logits = self._scores[1].copy()  # the next step writes there
        return last

    def __del__(self) -> None:
        """Give the memory back."""
        if getattr(self, "_context", None):
            self._library.llama_free(self._context)
        if getattr(self, "_model", None):
            self._library.llama_model_free(self._model)


def requantize(source: Path, kind: str, target: Path) -> None:
    """Write ``source`` with weights of one of `TYPES`; good for timing, since values are rounded twice.

    Raises:
        UsageError: llama.cpp refuses.
    """
    library = _library()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise UsageError(f"llama.cpp could not write {source} as {kind} to {target}")


def _library() -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
    return llama_cpp


RUNTIMES = (
    Runtime(
        "llamacpp",
        "llama-cpp-python",
        "bench --peers",
        unavailable,
        lambda: version("llama-cpp-python"),
        frozenset({Kind.GGUF}),
        "a .gguf file; `python -m rankbook.tools.runtimes.llamacpp` writes one in another type",
        lambda source, setting: LlamaCppModel(source.path, setting),
        lambda _: _library(),
        exact=False,
        peer=True,
    ),
)


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3 or arguments[1] not in TYPES:
        print(f"give FROM.gguf {'|'.join(TYPES)} TO.gguf", file=sys.stderr)
        return USAGE
    if reason := unavailable():
        print(reason, file=sys.stderr)
        return MISSING
    requantize(Path(arguments[0]), arguments[1], Path(arguments[2]))
    return OK


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
