"""Which model `rankbook bench` opens with which runtime."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankbook.tools.bench import peers
from rankbook.tools.bench.contender import Contender, Setting
from rankbook.tools.bench.exported import Exported
from rankbook.tools.errors import UsageError
from rankbook.tools.inspect import onnx_file
from rankbook.tools.runtimes.ort import KERNELS

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Tokens

OURS = "rankbook"
"""The runtime of exported files."""


@dataclass(frozen=True)
class ModelSubject:
    """A model and what runs it.

    Attributes:
        path: Exported folder or file; what a peer opens.
        kernels: For exported files one of `rankbook.tools.runtimes.ort.KERNELS`.
        runtime: `OURS`, or one of `rankbook.tools.bench.peers.PEERS`.
    """

    path: Path
    kernels: str = "auto"
    runtime: str = OURS

    @classmethod
    def parse(cls, text: str, kernels: str) -> ModelSubject:
        """Read ``PATH`` or ``PATH@KERNELS``; ``kernels`` is for what does not say.

        Raises:
            UsageError: Nothing lies at the path.
        """
        path, _, wanted = text.rpartition("@")
        if not path or wanted not in KERNELS:
            path, wanted = text, kernels
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist; give exported folders or .onnx files, with @{'|@'.join(KERNELS)}")
        return cls(Path(path), wanted)

    @classmethod
    def peer(cls, text: str) -> ModelSubject:
        """Read ``PEER=PATH``.

        Raises:
            UsageError: The peer is unknown, or nothing lies at the path.
        """
        runtime, path = peers.split(text)
        return cls(path, "auto", runtime)

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.path}@{self.kernels}" if self.runtime == OURS else f"{self.runtime}={self.path}"

    def open(self, setting: Setting) -> Contender:
        """Load the model.

        Raises:
            MissingError: The runtime or the native library is missing.
            UsageError: The runtime refuses the model.
        """
        if self.runtime == OURS:
            return Exported(self.path, self.kernels, setting)
        return peers.open_peer(self.runtime, self.path, setting)

    def warm(self) -> None:
        """Import what opening imports, and read what the file says about itself: that memory is not the model's."""
        names = ("onnxruntime", "onnx") if self.runtime == OURS else peers.PEERS[self.runtime].libraries
        for name in names:
            importlib.import_module(name)
        if "onnx" in names and (model := next(iter(sorted(self.path.glob("*.onnx"))), None)):
            onnx_file.read(model)


def random_tokens(length: int) -> Tokens:
    """Ids that every vocabulary has, (1, length); what they say does not matter for time."""
    return np.random.default_rng(0).integers(3, 250, (1, length))
