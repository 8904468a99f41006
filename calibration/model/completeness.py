"""Comparing the tensors that a source holds with those that its model has: nothing may be made up or left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from rankbook.calibration.checkpoint.integrity import INDEX, WEIGHTS, read_json, tensor_names
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.notes import note
from rankbook.calibration.source import file_of

_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""Names that wrappers put between others, with the wrapper; no model uses them itself."""
_OUTER = {"module.": "DataParallel", "base_model.model.": "PEFT"}
"""Names that wrappers put in front of all others."""
_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that older versions of transformers stored and that every version computes."""
_CACHE_SCALES = ("k_scale", "v_scale", "kv_scale", "output_scale", "k_zero_point", "v_zero_point")
"""Scales for caches of 8 bits in other runtimes: not part of what the weights compute."""
_CODES = ("qweight", "qzeros", "g_idx", "absmax", "quant_map", "weight_packed", "weight_scale", "weight_scale_inv")
"""Last parts of names that quantizers write."""
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")
_SHOWN = 3


def stored_names(location: str) -> list[str]:
    """Return the names of all tensors of a Hugging Face folder or id; empty where there are no safetensors."""
    try:
        if single := file_of(location, WEIGHTS):
            return tensor_names(single)
        if index := file_of(location, INDEX):
            return list(read_json(index)["weight_map"])
    except (OSError, LookupError, ValueError, TypeError):
        return []  # loading says what is wrong
    return []


def unwrapping(location: str, names: Collection[str]) -> dict[str, str]:
    """Return the renaming (pattern to replacement) that removes what wrappers left in the names of tensors.

    It is said in a `Note`. Empty where the names are plain.

    Raises:
        ValueError: An adapter that was not merged into its model.
    """
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        raise ValueError(
            f"{location} holds an adapter (LoRA) beside its model; merge it first (peft's merge_and_unload), then save"
        )
    inner = [part for part in _WRAPPERS if any(part in name.split(".") for name in names)]
    mapping = {rf"\b{part}\.": "" for part in inner}
    plain = [re.sub("|".join(mapping), "", name) if mapping else name for name in names]
    outer = [prefix for prefix in _OUTER if plain and all(name.startswith(prefix) for name in plain)]
    mapping |= {rf"^{re.escape(prefix)}": "" for prefix in outer}
    if mapping:
        makers = ", ".join([_WRAPPERS[part] for part in inner] + [_OUTER[prefix] for prefix in outer])
        note(f"the names of the tensors of {location} carry {', '.join(inner + outer)} ({makers}), which was removed")
    return mapping


def check_complete(location: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Check what transformers says of a loaded model.

    Tied weights and what transformers declares as optional are not in ``info``; position buffers are computed.

    Args:
        location: Where the model is from.
        model: The loaded model.
        info: ``output_loading_info`` of ``from_pretrained``.

    Raises:
        ValueError: Tensors that are missing, of another shape, or without a place although they change the result.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(name for name in info["missing_keys"] if name in parameters or not _COMPUTED.search(name))
    left = sorted(name for name in info["unexpected_keys"] if not _COMPUTED.search(name))
    if missing:
        raise ValueError(
            f"{location} lacks {_listed(missing, 'tensor')} of {len(parameters)} that the model has; random numbers in"
            f" their place would make the result worthless. {_cause(missing, left, model)}"
        )
    if mismatched := sorted(info.get("mismatched_keys", ()), key=str):
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"{location}: {_listed([entry[0] for entry in mismatched], 'tensor')} do not have the shape that"
            f" config.json asks for: {name} is {tuple(stored)}, not {tuple(wanted)}. it belongs to another model"
        )
    if changing := [name for name in left if _changes_result(name, model)]:
        raise ValueError(
            f"{location} holds {_listed(changing, 'tensor')} for which the model of config.json has no place, so it"
            f" would compute something else. {_cause([], changing, model)}"
        )
    if left:
        note(f"{location} holds {_listed(left, 'tensor')} that the language model does not use; left out")


def _changes_result(name: str, model: nn.Module) -> bool:
    """Return whether a tensor without a place belongs to a layer that the model has, or to a block more than it has."""
    parent, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    if parent in modules:
        return leaf not in _CACHE_SCALES and hasattr(modules[parent], "weight")
    found = _BLOCK.match(name)
    return found is not None and isinstance(modules.get(found[1]), nn.ModuleList)


def _cause(missing: list[str], left: list[str], model: nn.Module) -> str:
    """Say what has most likely gone wrong."""
    if codes := [name for name in left if name.rpartition(".")[2] in _CODES]:
        return (
            f"Names such as {codes[0]} are written by quantizers: give the model before it was"
            " quantized, or take it over with `rankbook import`"
        )
    if missing and all(name.startswith("lm_head.") for name in missing):
        return (
            "The output layer is not stored and config.json does not tie it to the embedding: set tie_word_embeddings"
            " to true if the model was trained so, else convert it again with the output layer"
        )
    wanted = getattr(adapter_of(model).config, "num_hidden_layers", 0)
    blocks = _blocks(missing or left)
    if blocks and min(blocks) > 0 and blocks == set(range(min(blocks), max(blocks) + 1)):
        if missing and max(blocks) == wanted - 1 and len(blocks) < wanted:
            return (
                f"The last {len(blocks)} blocks are missing or incomplete: config.json says num_hidden_layers"
                f" {wanted}, or the conversion or the download stopped early"
            )
        if left and min(blocks) >= wanted:
            return f"config.json says num_hidden_layers {wanted}, the weights have block {max(blocks)} too"
    for name in left:
        if other := next((item for item in missing if name != item and name.endswith(f".{item}")), None):
            return f"The names carry {name.removesuffix(other)!r} in front: rename the tensors"
        if other := next((item for item in missing if item.endswith(f".{name}")), None):
            return f"The names lack {other.removesuffix(name)!r} in front: rename the tensors"
    if left and missing:
        return (
            f"It holds {_listed(left, 'tensor')} instead: it was saved for another architecture than config.json names"
        )
    if left:
        return "config.json belongs to another model, or a setting in it (such as attention_bias) is wrong"
    return "The conversion or the download is incomplete: convert or download it again"


def _blocks(names: Iterable[str]) -> set[int]:
    found = [_BLOCK.match(name) for name in names]
    return {int(match[2]) for match in found if match} if all(found) else set()


def _listed(names: list[str], what: str) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {what}{'s' if len(names) != 1 else ''} ({shown})"
