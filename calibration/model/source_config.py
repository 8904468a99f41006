"""What config.json says before any weight is read: custom code, weights that are quantized already, attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rankbook.calibration.checkpoint.format import QUANT_METHOD
from rankbook.calibration.checkpoint.integrity import read_json
from rankbook.calibration.model.custom_code import asks_for_code, code_refused, is_trusted
from rankbook.calibration.source import file_of

BESIDE = "hf_quant_config.json"
"""The file of ModelOpt that says what older versions leave out of config.json."""
_ATTENTION = (None, "sdpa", "eager")
"""Kinds of attention that need nothing but torch."""
_DEQUANTIZED = ("fp8", "mxfp8", "mxfp4")
"""Stored formats that transformers turns into dense weights with torch alone."""
_TOOLS = {
    "gptq": "GPTQ (GPTQModel, AutoGPTQ)",
    "awq": "AWQ (AutoAWQ)",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "LLM Compressor (compressed-tensors)",
    "torchao": "torchao",
    "auto-round": "AutoRound",
    "modelopt": "NVIDIA ModelOpt",
}
"""What people call the tools, by ``quant_method``."""
_IMPORTED = ("gptq", "awq", "bitsandbytes", "compressed-tensors", "auto-round", "modelopt", *("fp8", "mxfp4"))
"""Those that `rankbook.calibration.imports` reads."""

_COUNT = re.compile(r"(layers?|blocks|depth|experts)$")
"""Names of fields that say how many modules there are."""


def read_config(location: str, *, quantized: bool = False) -> Any:
    """Return the configuration of a model that can be loaded without other libraries than torch.

    Attention that needs a package (flash_attention_2, ...) is replaced by what transformers chooses by itself; weights
    in fp8 or mxfp4 are marked to become dense while they are read.

    Args:
        location: Folder or Hugging Face id.
        quantized: Take one whose weights another tool has quantized.

    Raises:
        ValueError: No configuration, one that needs code of the folder, or weights that another tool has quantized.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=is_trusted())
    except Exception as error:  # each class of configuration has its own checks, with errors of many types
        reason = code_refused(location) if asks_for_code(error) else error
        raise ValueError(f"{location} cannot be loaded as a causal language model: {reason}") from error
    for part in _parts(config):
        if part._attn_implementation not in _ATTENTION:
            part._attn_implementation = None
        for name in ("quantization_config", "compression_config"):
            if not quantized and isinstance(entry := getattr(part, name, None), Mapping):
                _check_stored_format(location, name, entry)
    entry = getattr(config, "quantization_config", None)
    if not quantized and entry is None and (beside := entry_beside(location)):
        _check_stored_format(location, BESIDE, beside)
    if not quantized and isinstance(entry, dict) and entry.get("quant_method") in _DEQUANTIZED:
        entry["dequantize"] = True
    return config


def check_sizes(location: str, config: Any, weights: int) -> None:
    """Check a configuration against the bytes of its weights before anything of its sizes is made.

    Every layer and every row of the embeddings takes at least a bit of the files.

    Args:
        location: Folder or Hugging Face id, for the message.
        config: Of the model.
        weights: Bytes of all files of weights.

    Raises:
        ValueError: It asks for more than they can hold.
    """
    counts = ((key, value) for part in _parts(config) for key, value in vars(part).items() if _COUNT.search(key))
    asked = {key: value for key, value in counts if isinstance(value, int)}
    text = config.get_text_config()
    rows, columns = getattr(text, "vocab_size", None), getattr(text, "hidden_size", None)
    if isinstance(rows, int) and isinstance(columns, int):
        asked[f"vocab_size x hidden_size ({rows} x {columns})"] = rows * columns
    for key, value in asked.items():
        if value > 8 * weights:
            raise ValueError(
                f"{location}: its config.json asks for {key} = {value}, and its weights have {weights} bytes; one of"
                " them is damaged, copy the model again"
            )


def stored_format(config: Any) -> Mapping[str, Any] | None:
    """Return what a configuration says of quantized weights, or None where it says nothing."""
    for part in _parts(config):
        for name in ("quantization_config", "compression_config"):
            if isinstance(entry := getattr(part, name, None), Mapping):
                method = {"quant_method": "compressed-tensors"} if name == "compression_config" else {}
                return {**method, **entry}
    return None


def entry_beside(location: str) -> Mapping[str, Any] | None:
    """Return what ModelOpt's own file says of quantized weights, where a folder or model id has it."""
    path = file_of(location, BESIDE)
    return None if path is None else {"quant_method": "modelopt", **read_json(path).get("quantization", {})}


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it (text, vision)."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _check_stored_format(location: str, name: str, entry: Mapping[str, Any]) -> None:
    method = entry.get("quant_method") or ("compressed-tensors" if name == "compression_config" else None)
    method = method or entry.get("quant_library")  # of ModelOpt, which also writes modelopt_fp4
    method = "modelopt" if str(method).startswith("modelopt") else method
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        method = "bitsandbytes"
    if method in (QUANT_METHOD, *_DEQUANTIZED):
        return
    bits = entry.get("bits") or {True: 4}.get(bool(entry.get("load_in_4bit")), entry.get("w_bit"))
    width = f" to {bits} bits" if isinstance(bits, int) else ""
    taken = f"`rankbook import {location} -o DIR` takes it over as it is; or " if method in _IMPORTED else ""
    place = BESIDE if name == BESIDE else f"{name} in its config.json"
    tool = _TOOLS.get(str(method), f"{method!r}")
    raise ValueError(
        f"{location} is quantized already{width}, by {tool} (see {place}), so a second"
        f" quantization would start from its errors; {taken}give the model that it was made from (its model card"
        " names it), or dequantize it with that tool and save it as bf16"
    )
