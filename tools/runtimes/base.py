"""What every runtime offers to the commands: a language model that scores tokens and continues them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Tokens = npt.NDArray[np.int64]
    Logits = npt.NDArray[np.float32]


class LanguageModel(ABC):
    """A loaded model, whatever runs it.

    Attributes:
        name: For messages and reports.
        kernels: What computes packed layers: ``dense`` (decoded once), ``bodies``, ``native`` or ``native-int8``.
        tokenizer: The model's tokenizer, or None where none was found.
    """

    name: str
    kernels: str = "dense"
    tokenizer: Any = None

    @abstractmethod
    def logits(self, tokens: Tokens) -> Logits:
        """Score tokens (batch, length) without a cache: float32 (batch, length, vocabulary).

        Raises:
            UsageError: The model gives the last position only.
        """

    @abstractmethod
    def start(self, tokens: Tokens) -> Logits:
        """Begin a generation with tokens (1, length): fill the cache, return the last logits (vocabulary,)."""

    @abstractmethod
    def step(self, token: int) -> Logits:
        """Continue with one token, return the next logits (vocabulary,). `start` comes first."""
