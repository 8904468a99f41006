"""Finding and loading a model: a Hugging Face folder or id, a GGUF file, or a checkpoint of rankbook."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rankbook.calibration.checkpoint.extras import WEIGHTS
from rankbook.calibration.checkpoint.files import sha256_file
from rankbook.calibration.checkpoint.format import CheckpointError, open_checkpoint
from rankbook.calibration.checkpoint.integrity import tensor_names
from rankbook.calibration.model.completeness import check_complete, stored_names, unwrapping
from rankbook.calibration.model.custom_code import is_trusted
from rankbook.calibration.model.gguf_file import expert_sizes, read_once
from rankbook.calibration.model.source_config import check_sizes, read_config
from rankbook.calibration.model.tokenizer import read_tokenizer
from rankbook.calibration.notes import note
from rankbook.calibration.source import LOADABLE, Kind, Source, fetched, file_of, identify


def resolve(source: str | Path) -> Source:
    """Say what kind of model ``source`` is.

    Raises:
        ValueError: Nothing that can be loaded.
    """
    return identify(source, LOADABLE)


def load_model(source: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Load a causal language model for inference on the CPU.

    >>> model, tokenizer = rankbook.load("checkpoint")
    >>> type(model.model.layers[0].mlp.up_proj).__name__
    'CodebookLinear'

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
    if found.packed:  # transformers has the quantizer already: importing rankbook registers it
        open_checkpoint(found.location)
    with read_once() if found.gguf else nullcontext():
        return _load_weights(found, dtype), load_tokenizer(source)


def load_tokenizer(source: str | Path) -> Any:
    """Return the tokenizer of a model, or None where it has none."""
    found = resolve(source)
    return read_tokenizer(found.location, found.gguf)


def model_hash(source: str | Path) -> str:
    """Return a SHA-256 over the configuration and weight files of a model."""
    found = resolve(source)
    folder = Path(found.location)
    if found.kind is Kind.HUB and (config := file_of(found.location, "config.json")):
        folder = config.parent
    names = [found.gguf] if found.gguf else ["config.json", *sorted(file.name for file in folder.glob("*.safetensors"))]
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def source_folder(source: str | Path) -> Path | None:
    """Return the folder whose other files belong to the model; None for a .gguf file, which may lie among anything.

    Of a model of the hub they are fetched; what cannot be is said in a `Note`.
    """
    found = resolve(source)
    if found.kind is not Kind.HUB:
        return Path(found.location) if Path(source).is_dir() else None
    try:
        return fetched(found.location, [f"*{end}" for end in WEIGHTS])
    except Exception as error:  # the network, the hub and the library raise many types; the weights are there already
        note(f"files of {source} beside its weights could not be fetched: {error}")
        return None


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a model; one with a vision tower is in another list."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    if type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    listed = type(config) in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # also Mistral 4, which has no tower
    with_vision = listed or getattr(config, "vision_config", None) is not None
    return AutoModelForImageTextToText if with_vision else AutoModelForCausalLM


def _load_weights(found: Source, dtype: torch.dtype | None) -> Any:
    from safetensors import SafetensorError

    extra: dict[str, Any] = {"trust_remote_code": is_trusted(), "output_loading_info": True}
    extra["ignore_mismatched_sizes"] = True  # they are named below
    config = None
    if found.gguf:
        extra |= {"gguf_file": found.gguf, "dtype": dtype or torch.float32}
    else:  # no pickled weights: they can run code
        config = read_config(found.location)
        if weights := sum(path.stat().st_size for path in Path(found.location).glob("*.safetensors")):
            check_sizes(found.location, config, weights)
        renaming = unwrapping(found.location, stored_names(found.location)) or None
        extra |= {"config": config, "dtype": dtype or "auto", "use_safetensors": True, "key_mapping": renaming}
    try:
        extra |= expert_sizes(found.path) if found.gguf else {}
        model, info = auto_class(config).from_pretrained(found.location, **extra)
    except CheckpointError:
        raise
    except (ImportError, OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        where = _damaged(found) if isinstance(error, SafetensorError) else ""
        raise ValueError(f"{found.location} cannot be loaded as a causal language model: {where}{error}") from error
    check_complete(str(found.path), model, info)
    if config is None or (not found.packed and hasattr(config, "quantization_config")):
        _forget_stored_format(model, dtype or (torch.float32 if found.gguf else model.dtype))
    return model.eval().requires_grad_(False)


def _damaged(found: Source) -> str:
    """Return the beginning of a sentence about the first file of weights that cannot be read, or nothing."""
    files = sorted(Path(found.location).glob("*.safetensors"))
    name = next((path.name for path in files if not _is_readable(path)), None)
    return "" if name is None else f"{name} is truncated or damaged; copy or download it again: "


def _is_readable(path: Path) -> bool:
    try:
        tensor_names(path)
    except ValueError:
        return False
    return True


def _forget_stored_format(model: Any, dtype: torch.dtype) -> None:
    """Make what was stored in GGUF, fp8 or mxfp4 an ordinary model: of one dtype, and one that can be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(dtype)  # dense weights come in the dtype of the quantizer, the others as asked for
