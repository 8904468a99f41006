"""Opens whatever a user names as a model with the runtime that fits."""

from __future__ import annotations

from pathlib import Path

from rankbook.tools.backends.base import LanguageModel
from rankbook.tools.onnx_file import MODEL_NAME


def is_onnx(source: str | Path) -> bool:
    """Return whether ``source`` is an ``.onnx`` file or a folder that holds an exported model."""
    path = Path(source)
    return path.suffix == ".onnx" or (path / MODEL_NAME).is_file() or (path.is_dir() and _only_onnx(path))


def _only_onnx(folder: Path) -> bool:
    return not (folder / "config.json").is_file() and any(folder.glob("*.onnx"))


def open_model(
    source: str, *, threads: int | None = None, tokenizer: str | None = None, kernels: str = "auto"
) -> LanguageModel:
    """Load a model.

    Args:
        source: Hugging Face folder or id, GGUF, checkpoint, exported folder or ``.onnx`` file.
        threads: CPU threads.
        tokenizer: Model whose tokenizer is used instead of the model's own.
        kernels: For an exported file, see `rankbook.tools.backends.ort.KERNELS`.

    Raises:
        ValueError: There is no model, or it cannot be read.
        UsageError: The ONNX file cannot be used.
        MissingError: ONNX Runtime or the native library is needed and not there.
    """
    model: LanguageModel
    if is_onnx(source):
        from rankbook.tools.backends.ort import OrtModel

        model = OrtModel(Path(source), threads=threads, kernels=kernels)
    else:
        from rankbook.tools.backends.torch import TorchModel

        model = TorchModel(source, threads=threads)
    if tokenizer is not None:
        from rankbook.calibration.loading import load_tokenizer

        model.tokenizer = load_tokenizer(tokenizer)
    return model
