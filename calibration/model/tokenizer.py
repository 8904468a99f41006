"""Reading the tokenizer of a folder; nothing here needs torch, so that running an exported file does not load it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rankbook.calibration.model.custom_code import asks_for_code, code_refused, is_trusted

_FILES = ("tokenizer.*", "tokenizer_config.json", "vocab.*", "spiece.model", "*.tiktoken")


def read_tokenizer(location: str, gguf: str = "") -> Any:
    """Return the tokenizer of a folder or Hugging Face id, or None where there is none or none that can be read.

    Code that the folder brings along is run only inside of `trusted_code`. A tokenizer that cannot be read is said in a
    warning.

    Args:
        location: Folder or id.
        gguf: Name of the GGUF file in the folder, empty without one.
    """
    from transformers import AutoTokenizer

    folder = Path(location)
    # transformers makes an empty tokenizer of the model's class where a folder has none.
    if folder.is_dir() and not gguf and not any(next(folder.glob(name), None) for name in _FILES):
        return None
    extra = {"gguf_file": gguf} if gguf else {}
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=is_trusted(), **extra)
    except Exception as error:  # tokenizers raise plain Exception for a damaged file
        reason = code_refused(location) if asks_for_code(error) else error
        warnings.warn(f"the tokenizer of {location} cannot be read: {reason}", stacklevel=2)
        return None
