"""Finding and loading a model: a Hugging Face folder or id, a GGUF file, or one of our checkpoints."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.calibration.checkpoint.format import CheckpointError, open_checkpoint
from rankbook.calibration.source import LOADABLE, Source, identify

_TOKENIZER_FILES = ("tokenizer.*", "tokenizer_config.json", "vocab.*", "spiece.model", "*.tiktoken")


def resolve(source: str | Path) -> Source:
    """Say what kind of model ``source`` is.

    Raises:
        ValueError: Nothing that can be loaded.
    """
    return identify(source, LOADABLE)


def load_model(source: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a causal language model for inference on the CPU.

    Weights stay memory-mapped where the file's dtype is kept, so they are in memory once, as page cache.

    Args:
        source: See `resolve`.
        dtype: Dtype of the weights; None keeps the file's own (float32 for GGUF).

    Returns:
        The model in evaluation mode, without gradients, and its tokenizer (None where there is none).

    Raises:
        ValueError: No model there, or one that cannot be read.
    """
    found = resolve(source)
    if found.packed:
        open_checkpoint(found.location)
        from rankbook.calibration.checkpoint import hf

        hf.register()
    return _load_weights(found, dtype), load_tokenizer(source)


def load_tokenizer(source: str | Path) -> Any:
    """Return the tokenizer of a model, or None where it has none."""
    from transformers import AutoTokenizer

    found = resolve(source)
    folder = Path(found.location)
    # transformers makes an empty tokenizer of the model's class where a folder has none.
    if folder.is_dir() and not found.gguf and not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):
        return None
    extra = {"gguf_file": found.gguf} if found.gguf else {}
    try:
        return AutoTokenizer.from_pretrained(found.location, **extra)
    except Exception as error:  # tokenizers raise plain Exception for a damaged file
        warnings.warn(f"the tokenizer of {found.location} cannot be read: {error}", stacklevel=2)
        return None


def model_hash(source: str | Path) -> str:
    """Return a SHA-256 over the configuration and weight files of a model."""
    found = resolve(source)
    folder = Path(found.location)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        folder = Path(str(cached_file(found.location, "config.json"))).parent
    names = [found.gguf] if found.gguf else ["config.json", *sorted(file.name for file in folder.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def _auto_class(found: Source) -> Any:
    """Return the class of transformers that loads a model; one with a vision tower has a table of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if found.gguf:
        return AutoModelForCausalLM
    config = AutoConfig.from_pretrained(found.location)
    with_vision = getattr(config, "vision_config", None) is not None
    return (
        AutoModelForImageTextToText
        if with_vision and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        else AutoModelForCausalLM
    )


def _load_weights(found: Source, dtype: torch.dtype | None) -> Any:
    from safetensors import SafetensorError

    if found.gguf:
        extra: dict[str, Any] = {"gguf_file": found.gguf, "dtype": dtype or torch.float32}
    else:  # no pickled weights: they can run code
        extra = {"dtype": dtype or "auto", "use_safetensors": True}
    try:
        model: Any = _auto_class(found).from_pretrained(found.location, **extra)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{found.location} cannot be loaded as a causal language model: {error}") from error
    if found.gguf:  # it is an ordinary model now; these would keep it from being saved
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model.eval().requires_grad_(False)
