"""What every runtime has: room for positions, logits of every position, and a sentence where it is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rankbook.calibration.source import Kind
from rankbook.tools.errors import MissingError, UsageError
from rankbook.tools.runtimes.base import LanguageModel, Runtime


class Counter(LanguageModel):
    """Its logits say how many tokens came before."""

    name = "counter"
    context = 8

    def start(self, tokens: Any) -> Any:
        """Begin."""
        self.seen = tokens.shape[1]
        return np.full(4, self.seen, np.float32)

    def step(self, token: int) -> Any:
        """Go on."""
        self.seen += 1
        return np.full(4, self.seen, np.float32)


def test_scores_without_a_loop_of_its_own_are_those_of_the_last_position() -> None:
    scores = Counter().scores(np.zeros((2, 3), np.int64))
    assert scores.shape == (2, 1, 4)
    assert (scores == 3).all()
    with pytest.raises(UsageError, match="counter gives the logits of the last position only"):
        Counter().logits(np.zeros((2, 3), np.int64))
    assert Counter().logits(np.zeros((2, 1), np.int64)).shape == (2, 1, 4)


def test_positions_beyond_the_context_are_refused() -> None:
    Counter().check_room(8, "--tokens")
    with pytest.raises(UsageError, match="--tokens asks for 9 positions; counter holds 8"):
        Counter().check_room(9, "--tokens")


def test_a_model_that_says_nothing_has_neutral_answers() -> None:
    model = Counter()
    assert (model.file_bytes, model.packed, model.generation_config) == (0, (0, 0), {})
    assert model.generated(np.zeros((1, 1), np.int64), 3) is None
    with pytest.raises(UsageError, match="apply to PyTorch models; counter has its own settings"):
        model.override("none", None)


def test_a_runtime_that_cannot_be_used_says_why() -> None:
    runtime = Runtime("x", "X", "", lambda: "x is missing: pip install x", lambda: "1", frozenset({Kind.ONNX}))
    with pytest.raises(MissingError, match="pip install x"):
        runtime.require()
