"""Other runtimes for low-bit language models: one file each, imported when it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from rankbook.tools.bench.contender import Contender, Setting
from rankbook.tools.errors import MissingError, UsageError


@dataclass(frozen=True)
class Peer:
    """What there is to know before a peer's module is imported.

    Attributes:
        opens: What it opens.
        libraries: Modules that opening imports.
    """

    opens: str
    libraries: tuple[str, ...]


PEERS = {
    "genai": Peer(
        "a folder made by `python -m onnxruntime_genai.models.builder -p int4 -e cpu`", ("onnxruntime_genai", "onnx")
    ),
    "llamacpp": Peer(
        "a .gguf file; `python -m rankbook.tools.bench.peers.llamacpp` writes one in another type", ("llama_cpp",)
    ),
    "matmulnbits": Peer(
        "a folder written by `rankbook export --dialect ort`, run at accuracy level 4",
        ("onnxruntime", "onnx"),
    ),
}
"""The module of each name has ``unavailable() -> str | None`` and a class ``Model``."""


def split(text: str) -> tuple[str, Path]:
    """Read ``PEER=PATH``.

    Raises:
        UsageError: The peer is unknown, or nothing lies at the path.
    """
    name, equals, path = text.partition("=")
    if not equals or name not in PEERS:
        allowed = "; ".join(f"{peer}=PATH, {what.opens}" for peer, what in PEERS.items())
        raise UsageError(f"--peers {text}: beside models give {allowed}")
    if not Path(path).exists():
        raise UsageError(f"--peers {text}: {path} does not exist; give {PEERS[name].opens}")
    return name, Path(path)


def open_peer(name: str, path: Path, setting: Setting) -> Contender:
    """Load a model with one of `PEERS`.

    Raises:
        MissingError: Its package is not installed.
        UsageError: The package refuses the model.
    """
    module = importlib.import_module(f"rankbook.tools.bench.peers.{name}")
    if reason := module.unavailable():
        raise MissingError(reason)
    model: Contender = module.Model(path, setting)
    return model
