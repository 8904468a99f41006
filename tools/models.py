"""Opens whatever a user names as a model with the runtime that fits."""

from __future__ import annotations

from pathlib import Path

from rankbook.calibration.source import Kind, identify
from rankbook.tools.inspect.onnx_file import find_model
from rankbook.tools.runtimes.base import LanguageModel


def open_model(
    source: str, *, threads: int | None = None, tokenizer: str | None = None, kernels: str = "auto"
) -> LanguageModel:
    """Load a model.

    >>> model = rankbook.open_model("onnx", kernels="bodies")
    >>> model.start(model.tokenizer("the", return_tensors="np").input_ids).ndim
    1

    Args:
        source: Hugging Face folder or id, GGUF, checkpoint, exported folder or ``.onnx`` file.
        threads: CPU threads.
        tokenizer: Model whose tokenizer is used instead of the model's own.
        kernels: For an exported file, see `rankbook.tools.runtimes.ort.KERNELS`.

    Raises:
        ValueError: There is no model, or it cannot be read.
        UsageError: The ONNX file cannot be used.
        MissingError: ONNX Runtime or the native library is needed and not there.
    """
    model: LanguageModel
    found = identify(source)
    if found.kind is Kind.ONNX:
        from rankbook.tools.runtimes.ort import OrtModel

        model = OrtModel(found.path, threads=threads, kernels=kernels)
    else:
        from rankbook.tools.runtimes.torch import TorchModel

        model = TorchModel(source, threads=threads)
    if tokenizer is not None:
        from rankbook.calibration.model.loading import load_tokenizer

        model.tokenizer = load_tokenizer(tokenizer)
    return model


def find_checkpoint(path: Path, given: Path | None) -> Path | None:
    """Return the checkpoint that an exported file was made from: the one given, or the one its export wrote down."""
    if given is not None:
        return given
    folder = find_model(path).parent
    resolved = folder / "rankbook-export.yaml"
    if not resolved.is_file():
        return None
    import yaml

    noted = (yaml.safe_load(resolved.read_text(encoding="utf-8")) or {}).get("export", {}).get("checkpoint", "")
    # Both folders may have moved together.
    candidates = [Path(noted), folder.parent / Path(noted).name]
    return next((candidate for candidate in candidates if noted and candidate.is_dir()), None)
