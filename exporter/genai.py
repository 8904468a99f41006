"""``genai_config.json``: what ONNX Runtime GenAI must know to run an exported folder as it is.

The names and their meaning are those of onnxruntime-genai 0.18. It refuses custom operators whose library lies outside
of the folder, so the library goes along as a copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rankbook.calibration.checkpoint.extras import GENAI_CONFIG, LIBRARY
from rankbook.calibration.schema import read_object
from rankbook.calibration.source import ONNX_NAME
from rankbook.exporter.cache_names import PAST, PRESENT, is_state
from rankbook.exporter.options import ExportOptions
from rankbook.exporter.passes.kv_cache import cache_layers
from rankbook.exporter.properties import PREFIX, Metadata
from rankbook.plugins import library

ROOM = 4096
"""Most positions of ``search.max_length`` for a cache that is reserved as a whole: a context of 131,072 would take
gigabytes before the first token. ``set_search_options(max_length=...)`` asks for more."""
_TYPES = {name: name for name in ("ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama")}
_TYPES |= {name: name for name in ("mistral", "nemotron", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3")}
_TYPES |= {"gpt_oss": "gptoss", "hunyuan_v1_dense": "hunyuandensev1"}
"""GenAI's name of the model types of transformers that it knows as plain decoders."""
_CLOSEST = "llama"
"""What it does for a decoder depends on inputs and outputs, not on the type, so this one serves the others."""
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "min_length", "repetition_penalty", "no_repeat_ngram_size")
"""Fields of generation_config.json that GenAI has by the same names."""
_NOT_OBEYED = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings", "sequence_bias", "min_p"),
    *("forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "typical_p", "guidance_scale"),
)
"""Fields that `rankbook generate` obeys or offers, and GenAI does not know."""
_PLAIN = frozenset({"input_ids", "attention_mask", "position_ids"})


@dataclass(frozen=True)
class GenAiReport:
    """What was written for ONNX Runtime GenAI.

    Attributes:
        type: Its name for the model, or None where nothing was written.
        reason: Why nothing was written; empty where something was.
        library: Whether the native library lies in the folder.
        closest: Whether GenAI does not know the model's own type, and ``type`` is another decoder.
        not_obeyed: Fields of generation_config.json that it does not know.
    """

    type: str | None = None
    reason: str = ""
    library: bool = False
    closest: bool = False
    not_obeyed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it for people."""
        if self.type is None:
            return f"no {GENAI_CONFIG}: {self.reason}"
        parts = [f"type {self.type}{' (the closest one)' if self.closest else ''}"]
        parts += [f"with {LIBRARY}" if self.library else "without the native library"]
        return "; ".join([*parts, *([f"not obeyed: {', '.join(self.not_obeyed)}"] if self.not_obeyed else [])])


def write_genai_config(
    folder: Path, model: ir.Model, config: Mapping[str, Any], options: ExportOptions, *, with_library: bool
) -> GenAiReport:
    """Write the configuration, and copy the native library.

    Args:
        folder: Holds the tokenizer and generation_config.json.
        model: The graph that was written there.
        config: config.json of the language model.
        options: What the file is.
        with_library: See `wants_library`.

    Raises:
        SchemaError: A file of the folder is not JSON.
    """
    if with_library:
        shutil.copyfile(library.library("ort"), folder / LIBRARY)
    if reason := refusal(model, options):
        return GenAiReport(reason=reason, library=with_library)
    generation = _read(folder / "generation_config.json") or {"eos_token_id": config.get("eos_token_id")}
    kind = str(config.get("model_type", ""))
    described = {
        "model": {
            "type": _TYPES.get(kind, _CLOSEST),
            **_tokens(folder, config, generation),
            "vocab_size": _shape(model.graph.outputs[0])[-1],
            "context_length": _context(model, config),
            "decoder": _decoder(model, config, with_library=with_library),
        },
        "search": _search(model, config, generation, in_place=Metadata.of(model.metadata_props).in_place),
    }
    (folder / GENAI_CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return GenAiReport(
        type=_TYPES.get(kind, _CLOSEST),
        library=with_library,
        closest=kind not in _TYPES,
        not_obeyed=tuple(name for name in _NOT_OBEYED if generation.get(name)),
    )


def wants_library(options: ExportOptions) -> bool:
    """Return whether the native library goes along: as chosen, else for ``--graph ort`` where it is built.

    Raises:
        FileNotFoundError: It is asked for and not built.
    """
    if options.with_library:
        library.library("ort")
    if options.with_library is not None:
        return options.with_library
    return options.graph == "ort" and library.unavailable("ort") is None


def refusal(model: ir.Model, options: ExportOptions) -> str:
    """Return why GenAI cannot run the file, or an empty text."""
    if options.dtype == "bf16":
        return "bf16 does not run on a CPU; export with --dtype fp32 or fp16"
    if options.kv == "int8":
        return "it gives no scales of a cache in 8 bits; export with --kv float"
    if any(is_state(str(value.name)) for value in model.graph.inputs):
        return "it supports keys and values only, and this model keeps states of convolutions or recurrences"
    past = [value for value in model.graph.inputs if str(value.name).startswith(PAST)]
    if foreign := sorted({str(value.name) for value in model.graph.inputs if value not in past} - _PLAIN):
        return f"it does not give the input {foreign[0]}; export with --graph standard or ort and --inputs ids"
    shapes = {(shape[1], shape[3]) for shape in map(_shape, past)}
    if len(shapes) != 1:
        return "it needs keys and values of one shape in all layers, and this model has several shapes"
    return ""


def _decoder(model: ir.Model, config: Mapping[str, Any], *, with_library: bool) -> dict[str, Any]:
    names = {str(value.name) for value in model.graph.inputs}
    _, heads, _, size = next(_shape(value) for value in model.graph.inputs if str(value.name).startswith(PAST))
    query_heads = _first(config, "num_attention_heads", "n_head", "num_heads") or heads
    entries = {"custom_ops_library": LIBRARY} if with_library else {}
    return {
        # The last entry: a DequantizeLinear of 4 bits before a MatMul must not round the other factor, the default.
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [],
            **entries,
            "session.qdq_matmulnbits_accuracy_level": "1",
        },
        "filename": ONNX_NAME,
        "head_size": size,
        "hidden_size": _first(config, "hidden_size", "n_embd", "d_model") or query_heads * size,
        "num_attention_heads": query_heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": cache_layers(model.graph.inputs),
        "inputs": {
            **{name: name for name in sorted(names & _PLAIN)},
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
    }


def _tokens(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens; the end token of the tokenizer ends a text too, as in `rankbook generate`."""
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
    own = _token_of(folder, "eos_token")
    ends += [own] if own is not None and own not in ends else []
    pad = next(
        (given["pad_token_id"] for given in (generation, config) if given.get("pad_token_id") is not None),
        _token_of(folder, "pad_token"),
    )
    begin = next(
        (given["bos_token_id"] for given in (generation, config) if given.get("bos_token_id") is not None),
        _token_of(folder, "bos_token"),
    )
    found = {
        "bos_token_id": begin,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad if pad is not None else ends[0] if ends else 0,
    }
    return {name: value for name, value in found.items() if value is not None}


def _token_of(folder: Path, name: str) -> int | None:
    """Return the number of a special token that tokenizer_config.json names, or None."""
    named = _read(folder / "tokenizer_config.json").get(name)
    text = named.get("content") if isinstance(named, dict) else named
    added = _read(folder / "tokenizer.json").get("added_tokens", ())
    return next((int(token["id"]) for token in added if text and token.get("content") == text), None)


def _search(
    model: ir.Model, config: Mapping[str, Any], generation: Mapping[str, Any], *, in_place: bool
) -> dict[str, Any]:
    context = _context(model, config)
    suggested = {name: generation[name] for name in _SEARCH if generation.get(name) is not None}
    return {
        "do_sample": False,
        **suggested,
        "max_length": min(context, ROOM) if in_place else context,
        "past_present_share_buffer": in_place,
    }


def _context(model: ir.Model, config: Mapping[str, Any]) -> int:
    """Return up to how many positions the file is right; `ROOM` where nothing limits them."""
    noted = model.metadata_props.get(f"{PREFIX}context", "")
    return int(noted or _first(config, "max_position_embeddings", "n_positions") or ROOM)


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)


def _shape(value: ir.Value) -> list[Any]:
    return [] if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of the folder; an empty one where there is none."""
    return read_object(path, "copy the model again") if path.is_file() else {}
