"""What `rankbook bench` times: a loaded model that continues tokens greedily, whatever runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Tokens


@dataclass(frozen=True)
class Setting:
    """How a model is opened.

    Attributes:
        threads: Threads; the runtime's choice when None.
        capacity: Tokens that prompt and answer have at most.
        shared: Other models wait in the same process: workers must not spin between calls.
    """

    threads: int | None
    capacity: int
    shared: bool


class Contender(ABC):
    """A loaded model.

    Attributes:
        kernels: What computes packed layers; the runtime's name and version for a peer.
        file_bytes: The files that were opened.
    """

    kernels: str
    file_bytes: int

    @property
    @abstractmethod
    def packed(self) -> tuple[int, int]:
        """Bytes of all packed layers and embeddings, each counted once, and the number of their weights.

        Not read before it is asked for: the memory that this takes is not the model's.
        """

    @abstractmethod
    def start(self, tokens: Tokens) -> int:
        """Begin with tokens (1, length): fill the cache, return the most likely next token."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Continue with one token, return the most likely next one. `start` comes first."""
