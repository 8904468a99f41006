"""Greedy continuations of two models compared, on models made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.greedy import PROMPTS, compare_greedy
from rankbook.tools.runtimes.base import LanguageModel

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens


class Counter(LanguageModel):
    """Prefers the token after the last one; from its ``wrong_at``-th answer on, prefers another by ``by``."""

    name = "counter"
    positions: int | None = None

    def __init__(self, wrong_at: int | None = None, by: float = 0.0) -> None:
        self.tokenizer = lambda _: {"input_ids": [1]}
        self._wrong_at, self._by, self._answers = wrong_at, by, 0

    @property
    def context(self) -> int | None:
        return self.positions

    def logits(self, tokens: Tokens) -> Logits:
        raise NotImplementedError

    def start(self, tokens: Tokens) -> Logits:
        self._answers = 0
        return self.step(int(tokens[0, -1]))

    def step(self, token: int) -> Logits:
        scores = np.zeros(16, np.float32)
        scores[(token + 1) % 16] = 10
        scores[(token + 2) % 16] = 9
        if self._wrong_at is not None and self._answers >= self._wrong_at:
            scores[(token + 2) % 16] = 10 + self._by
        self._answers += 1
        return scores


def test_equal_models_agree_on_every_prompt():
    checks = compare_greedy(Counter(), Counter(), 20, 1e-4)
    assert [item.prompt for item in checks] == list(PROMPTS)
    assert all(item.passed and item.same == 20 and item.margin is None for item in checks)


def test_a_difference_is_found_where_it_is():
    (check,) = compare_greedy(Counter(), Counter(wrong_at=7, by=1.0), 20, 1e-4, prompts=["x"])
    # The first model prefers its token by 10 - 9, its largest logit is 10.
    assert check.same == 7
    assert check.margin == pytest.approx(0.1)
    assert not check.passed


def test_a_tie_within_tolerance_is_no_failure():
    (check,) = compare_greedy(Counter(), Counter(wrong_at=7, by=1.0), 20, 0.2, prompts=["x"])
    assert check.same == 7
    assert check.passed


def test_no_tokens_and_no_tokenizer_are_refused():
    short = Counter()
    short.positions = 8
    with pytest.raises(UsageError, match="greedy check of 8 tokens asks for 9 positions; counter holds 8"):
        compare_greedy(Counter(), short, 8, 1e-4)
    with pytest.raises(UsageError, match="at least 1"):
        compare_greedy(Counter(), Counter(), 0, 1e-4)
    silent = Counter()
    silent.tokenizer = None
    with pytest.raises(UsageError, match="no tokenizer"):
        compare_greedy(silent, Counter(), 4, 1e-4)
