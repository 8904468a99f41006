"""Rankbook: low-bit LLMs with low-rank codebooks, from PyTorch to ONNX and TensorRT.

The names below are the public API. Importing the package costs nothing: a name loads what it needs when it is used
for the first time. From the import on, `transformers` loads checkpoints of this project by itself.

>>> import rankbook
>>> options = rankbook.QuantizeOptions(method="rtn", bits=4, calib="text.txt", calib_sequences=2, calib_length=32)
>>> report = rankbook.quantize("model", "checkpoint", options)
>>> exported = rankbook.export("checkpoint", "onnx", rankbook.ExportOptions(logits="all"))
>>> exported.layers == len(report.layers) == 14
True
>>> found = [rankbook.evaluate(rankbook.open_model(name), "text.txt") for name in ("onnx", "checkpoint")]
>>> abs(found[0].perplexity / found[1].perplexity - 1) < 1e-4
True
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rankbook._transformers_hook import install as _install

if TYPE_CHECKING:
    from rankbook.tools.api import *

__all__ = [
    "METHODS",
    "BuildOptions",
    "EngineReport",
    "EvalOptions",
    "EvalResult",
    "ExportOptions",
    "ExportReport",
    "GenerateOptions",
    "Generation",
    "ImportReport",
    "Inspection",
    "LanguageModel",
    "ParityOptions",
    "ParityReport",
    "QuantizeOptions",
    "QuantizeReport",
    "Setting",
    "build",
    "evaluate",
    "export",
    "generate",
    "import_model",
    "inspect",
    "load",
    "open_model",
    "parity",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rankbook' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from rankbook.tools import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
