"""What a model folder holds beside its weights: tokenizer, processors, templates, code, licence; it goes along."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from rankbook.calibration.checkpoint.output import LISTING, RESULTS
from rankbook.calibration.notes import note
from rankbook.calibration.schema import read_object
from rankbook.calibration.source import MANIFEST

WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".ot", ".npy", ".npz"),
    *(".onnx", ".onnx_data", ".onnx.data", ".tflite", ".engine", ".distcp", ".index.json"),
)
"""Ends of the names of weights and of their indices."""
MOST_BYTES = 64 << 20
"""Largest file that goes along; tokenizers have up to about 35 MB."""
MOST_FILES = 1000
"""Files that go along: a folder with more is not a model's alone."""
GENAI_CONFIG, LIBRARY = "genai_config.json", "librankbook_ort.so"
"""What an exported folder holds for ONNX Runtime GenAI, and the native library beside it."""
_WRITTEN = frozenset({"config.json", "quantize_config.json", "hf_quant_config.json", MANIFEST, LISTING})
_WRITTEN |= {GENAI_CONFIG, LIBRARY, RESULTS}
"""Files that describe the source's weights, or run them; the new folder has its own."""
_SHOWN = 3


def copy_extras(source: Path, target: Path, *, also: Collection[str] = ()) -> None:
    """Copy everything of a model folder that is not weights, folders without weights in them included.

    Hidden files stay behind. Links are followed within the folder's real location alone (in the cache of the Hugging
    Face hub, within the model's). What is left out because of that or of its size is said in a `Note`.

    Args:
        source: Folder of the model.
        target: Folder that gets the copies, as files.
        also: Names to copy although the new folder usually has its own, such as config.json.
    """
    source = source.resolve()
    root = source.parent.parent if source.parent.name == "snapshots" else source
    outside, large = [], []
    for count, path in enumerate(_extras(source, also), 1):
        name = path.relative_to(source).as_posix()
        if not path.resolve().is_relative_to(root) or not path.is_file():
            outside.append(name)
        elif path.stat().st_size > MOST_BYTES or count > MOST_FILES:
            large.append(name)
        else:
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if outside:
        note(f"left out, since they lead out of {source}: {_shown(outside)}")
    if large:
        note(f"left behind in {source}, beyond {MOST_BYTES >> 20} MiB or {MOST_FILES} files: {_shown(large)}")


def settle_tokenizer(folder: Path) -> None:
    """Write tokenizer_config.json so that transformers before version 5 reads it too, as Optimum pins it.

    Version 5 calls tokenizers that are tokenizer.json alone by a name that older ones do not know, keeps a list where
    they want a mapping, and leaves out which inputs a model has: older ones then make token_type_ids, which no decoder
    takes.

    Raises:
        SchemaError: The file is not JSON.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / "tokenizer.json").is_file():
        return
    found = settled = read_object(path, "copy the model again")
    if found.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        inputs = found.get("model_input_names", ["input_ids", "attention_mask"])
        settled = {**found, "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    if isinstance(special := found.get("extra_special_tokens"), list):
        kept = {name: value for name, value in settled.items() if name != "extra_special_tokens"}
        settled = {**kept, "additional_special_tokens": special}
    if settled != found:
        path.write_text(json.dumps(settled, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_weights(name: str) -> bool:
    """Return whether a file is weights, or an index of weights, by its name."""
    return name.lower().endswith(WEIGHTS)


def _extras(folder: Path, also: Collection[str]) -> Iterator[Path]:
    """Yield the files, and links to anything, that may go along, in a fixed order."""
    top = True
    for place, folders, files in os.walk(folder):
        here = Path(place)
        if not top and any(is_weights(name) for name in files):  # another model, or the state of a training run
            folders.clear()
            continue
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted((*files, *linked)):
            if not name.startswith(".") and not is_weights(name) and (name not in _WRITTEN or not top or name in also):
                yield here / name
        top = False


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
