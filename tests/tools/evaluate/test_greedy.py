"""Greedy continuations of two models compared, on models made by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from rankbook.tools.errors import UsageError
from rankbook.tools.evaluate.greedy import PROMPTS, compare_greedy
from rankbook.tools.runtimes.base import LanguageModel
from rankbook.tools.runtimes.torch import TorchModel
from tests.tiny import tiny_model

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


class OtherLoop(Counter):
    """Its library's loop gives another token at one place than its steps do."""

    def __init__(self, wrong_at: int) -> None:
        super().__init__()
        self._loop_wrong_at = wrong_at

    def generated(self, tokens: Tokens, count: int) -> list[int]:
        right = [(int(tokens[0, -1]) + 1 + index) % 16 for index in range(count)]
        return [token + (index == self._loop_wrong_at) for index, token in enumerate(right)]


def test_a_loop_that_differs_from_the_library_s_own_is_found():
    (same,) = compare_greedy(OtherLoop(99), Counter(), 10, 1e-4, prompts=["x"])
    assert (same.passed, same.same, same.generated) == (True, 10, 10)
    (check,) = compare_greedy(OtherLoop(4), Counter(), 10, 1e-4, prompts=["x"])
    assert (check.passed, check.same, check.generated) == (False, 4, 4)


def test_torch_continues_as_transformers_does(tmp_path):
    """Also with settings of the model that would change a greedy text: they are not part of the comparison."""
    model = tiny_model("llama", tmp_path / "model")
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.eos_token_id = list(range(100))
    model.generation_config.save_pretrained(tmp_path / "model")
    mine = TorchModel(tmp_path / "model")
    prompt = np.array([[256, 10, 20, 30]], np.int64)
    wanted, logits, found = mine.generated(prompt, 12), mine.start(prompt), []
    for _ in range(12):
        found.append(int(logits.argmax()))
        logits = mine.step(found[-1])
    assert found == wanted
    assert mine.generation_config["repetition_penalty"] == 3.0
