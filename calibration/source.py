"""What a path or name given as a model is; the one place that decides it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

MANIFEST = "rankbook.json"
"""Marks a checkpoint."""
ONNX_NAME = "model.onnx"
"""Name of the graph in an exported folder."""
ENGINE_NAME, ENGINE_MANIFEST = "model.engine", "engine.json"
"""The engine in an engine folder, and the file that marks the folder."""

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


class Kind(Enum):
    """What a model can be; the value is for messages. A folder that could be several is the first of them."""

    ENGINE = "an engine folder"
    CHECKPOINT = "a checkpoint"
    ONNX = "an exported folder or .onnx file"
    MODEL = "a Hugging Face folder"
    GGUF = "a .gguf file"
    HUB = "a model id of the Hugging Face hub"


LOADABLE = frozenset({Kind.CHECKPOINT, Kind.MODEL, Kind.GGUF, Kind.HUB})
"""What PyTorch loads."""
_MARKS = {
    Kind.ENGINE: ENGINE_MANIFEST,
    Kind.CHECKPOINT: MANIFEST,
    Kind.ONNX: ".onnx file",
    Kind.MODEL: "config.json",
    Kind.GGUF: ".gguf file",
}


@dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
        kind: What it is.
        location: Its folder, or its id on the hub.
        file: Name of the file in the folder that is the model: graph, GGUF or engine; empty for the other kinds.
    """

    kind: Kind
    location: str
    file: str = ""

    @property
    def path(self) -> Path:
        """The file, or the folder where the model is more than one file."""
        return Path(self.location) / self.file

    @property
    def gguf(self) -> str:
        """Name of the GGUF file, or empty."""
        return self.file if self.kind is Kind.GGUF else ""

    @property
    def packed(self) -> bool:
        """Whether it is a checkpoint of this project."""
        return self.kind is Kind.CHECKPOINT


def identify(source: str | Path, kinds: Collection[Kind] = frozenset(Kind)) -> Source:
    """Say what ``source`` is.

    Args:
        source: A path, or a model id.
        kinds: What the caller can use; nothing else is looked for.

    Raises:
        ValueError: It is none of ``kinds``.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path, kinds)
    if path.is_file():
        return _file(path, kinds)
    if Kind.HUB in kinds and _may_be_id(str(source)):
        return Source(Kind.HUB, str(source))
    hint = "; a model of the Hugging Face hub is named owner/name" if Kind.HUB in kinds else ""
    raise ValueError(f"{source} does not exist; give {_allowed(kinds)}{hint}")


def _folder(path: Path, kinds: Collection[Kind]) -> Source:
    for kind, look in _LOOKS.items():
        if kind in kinds and (file := look(path)) is not None:
            return Source(kind, str(path), file)
    marks = [mark for kind, mark in _MARKS.items() if kind in kinds]
    raise ValueError(f"{path} holds no {' and no '.join(marks)}; give {_allowed(kinds)}")


def _file(path: Path, kinds: Collection[Kind]) -> Source:
    kind = {".gguf": Kind.GGUF, ".onnx": Kind.ONNX, ".engine": Kind.ENGINE}.get(path.suffix)
    if kind in kinds and kind is not None:
        return Source(kind, str(path.parent), path.name)
    raise ValueError(f"{path} is a file, but not of a kind that can be used; give {_allowed(kinds)}")


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder is a checkpoint of this project: by its manifest, or by config.json and weights.

    The manifest is missing where transformers has saved the model again.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False
    return method == "rankbook" and any(folder.glob("*.safetensors"))


def _onnx(folder: Path) -> str | None:
    """The graph of an exported folder, or the only one; not one of several beside a model's own weights."""
    if (folder / ONNX_NAME).is_file():
        return ONNX_NAME
    return _only(folder, "*.onnx") if not any(folder.glob("*.safetensors")) else None


def _only(folder: Path, pattern: str) -> str | None:
    found = sorted(file.name for file in folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} {pattern[1:]} files ({', '.join(found)}); name the one to use")
    return found[0] if found else None


_LOOKS: dict[Kind, Callable[[Path], str | None]] = {
    Kind.ENGINE: lambda folder: ENGINE_NAME if (folder / ENGINE_MANIFEST).is_file() else None,
    Kind.CHECKPOINT: lambda folder: "" if is_checkpoint(folder) else None,
    Kind.ONNX: _onnx,
    Kind.MODEL: lambda folder: "" if (folder / "config.json").is_file() else None,
    Kind.GGUF: lambda folder: _only(folder, "*.gguf"),
}
"""What finds each kind in a folder: the name of its file, empty for a model of several, None where it is not there."""


def _may_be_id(name: str) -> bool:
    """Tell an id from a mistyped path without asking the hub."""
    if not _HUB_ID.fullmatch(name):
        return False
    owner, slash, _ = name.partition("/")
    # An id without an owner is one of the first models; what is not in the cache is more likely a missing folder.
    return not Path(owner).is_dir() if slash else _is_cached(name)


def file_of(location: str, name: str) -> Path | None:
    """Return a file of a Hugging Face folder, or of a model of the hub, fetched where need be; None if it has none.

    Raises:
        OSError: The hub does not answer.
    """
    from transformers.utils.hub import cached_file

    found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(str(found))


def fetched(hub_id: str, leave_out: list[str], revision: str | None = None) -> Path:
    """Fetch the files of a model of the hub but those that match; return their folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, ignore_patterns=leave_out, revision=revision))


def hub_origin(folder: str | Path) -> dict[str, str]:
    """Return ``hub_id`` and ``revision`` of a folder in the cache of the hub; nothing of another one."""
    found = _SNAPSHOT.search(Path(folder).absolute().as_posix())
    return {"hub_id": found[1].replace("--", "/", 1), "revision": found[2]} if found else {}


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _allowed(kinds: Collection[Kind]) -> str:
    *first, last = [kind.value for kind in Kind if kind in kinds]
    return f"{', '.join(first)} or {last}" if first else last
