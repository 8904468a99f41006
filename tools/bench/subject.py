"""Which model `rankbook bench` opens with which runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rankbook.calibration.source import Kind, identify
from rankbook.tools.errors import UsageError
from rankbook.tools.runtimes import AUTO, LanguageModel, Setting, find, open_model, peers, runtimes

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Tokens


@dataclass(frozen=True)
class ModelSubject:
    """A model and what runs it.

    Attributes:
        path: What the runtime opens.
        runtime: Its name, or ``auto``.
        is_peer: Whether it is a model of somebody else, with which the others are compared.
    """

    path: Path
    runtime: str = AUTO
    is_peer: bool = False

    @classmethod
    def parse(cls, text: str, runtime: str) -> ModelSubject:
        """Read ``PATH`` or ``PATH@RUNTIME``; ``runtime`` is for what does not say.

        The runtime of a peer runs a file of this project, too: ``PATH@genai``.

        Raises:
            UsageError: Nothing lies at the path.
        """
        names = [AUTO, *(name for name, item in runtimes().items() if item.open)]
        path, _, wanted = text.rpartition("@")
        if not path or wanted not in names:
            path, wanted = text, runtime
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist; give models, e.g. exported folders, with @{'|@'.join(names)}")
        return cls(Path(path), wanted)

    @classmethod
    def on_device(cls, text: str) -> ModelSubject:
        """Read ``PATH`` or ``PATH@RUNTIME`` for a GPU: exported files run there with the native library.

        Raises:
            UsageError: Nothing lies at the path, or the runtime is one that runs on the CPU alone.
        """
        found = cls.parse(text, AUTO)
        if found.runtime in peers():
            raise UsageError(f"{text}: {found.runtime} runs on the CPU; leave --device cuda out")
        return found if found.runtime != AUTO or found.kind is not Kind.ONNX else cls(found.path, "native-cuda")

    @classmethod
    def parse_peer(cls, text: str) -> ModelSubject:
        """Read ``PEER=PATH``.

        Raises:
            UsageError: The peer is unknown, or nothing lies at the path.
        """
        name, equals, path = text.partition("=")
        if not equals or name not in peers():
            allowed = "; ".join(f"{peer}=PATH, {what.opens}" for peer, what in peers().items())
            raise UsageError(f"--peers {text}: beside models give {allowed}")
        if not Path(path).exists():
            raise UsageError(f"--peers {text}: {path} does not exist; give {peers()[name].opens}")
        return cls(Path(path), name, is_peer=True)

    @property
    def kind(self) -> Kind:
        """What it is; what is nothing that is known counts as an exported file, and is refused where it is opened."""
        try:
            return identify(self.path).kind
        except ValueError:
            return Kind.ONNX

    @property
    def is_engine(self) -> bool:
        """Whether it is an engine folder."""
        return self.kind is Kind.ENGINE

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.runtime}={self.path}" if self.is_peer else f"{self.path}@{self.runtime}"

    def open(self, setting: Setting) -> LanguageModel:
        """Load the model.

        Raises:
            MissingError: The runtime or the native library is missing.
            UsageError: The runtime refuses the model.
        """
        return open_model(self.path, self.runtime, setting)

    def prepare(self) -> None:
        """Import what opening imports, and read what the file says about itself: that memory is not the model's."""
        runtime, source = find(self.path, self.runtime)
        runtime.prepare(source)


def random_tokens(length: int) -> Tokens:
    """Ids that every vocabulary has, (1, length); what they say does not matter for time."""
    return np.random.default_rng(0).integers(3, 250, (1, length))
