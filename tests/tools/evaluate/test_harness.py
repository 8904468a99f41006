"""What lm-evaluation-harness asks of a model; the harness itself runs in tests/ecosystem."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import processors

from rankbook.calibration.notes import Note
from rankbook.tools import errors
from rankbook.tools.evaluate import harness
from rankbook.tools.evaluate.harness import Scorer, evaluate_tasks
from rankbook.tools.evaluate.options import HarnessOptions
from rankbook.tools.runtimes import LanguageModel
from tests.tiny import VOCABULARY, tiny_tokenizer
from tests.tools.files import run_cli

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens


class Counting(LanguageModel):
    """Prefers the token after the last one: a logit of 2 against 0 for all others."""

    name = "counting"

    def __init__(self, last_only: bool = False) -> None:
        self.tokenizer = tiny_tokenizer()
        self._last_only = last_only

    @property
    def context(self) -> int:
        return 8

    def start(self, tokens: Tokens) -> Logits:
        return self.scores(tokens)[0, -1]

    def step(self, token: int) -> Logits:
        return self.start(np.array([[token]]))

    def scores(self, tokens: Tokens) -> Logits:
        assert tokens.shape[1] <= 8, "no more than the model holds"
        found = 2 * np.eye(VOCABULARY, dtype=np.float32)[(tokens + 1) % 256]
        return found[:, -1:] if self._last_only else found


HIT = 2 - np.log(np.exp(2) + VOCABULARY - 1)
MISS = HIT - 2


def test_a_continuation_is_scored_behind_its_context() -> None:
    scorer: Any = Scorer(Counting())
    likelihood, greedy = scorer._score([3], [4, 5])
    assert likelihood == pytest.approx(2 * HIT)
    assert greedy
    likelihood, greedy = scorer._score([3], [4, 9])
    assert likelihood == pytest.approx(HIT + MISS)
    assert not greedy
    assert scorer._score(range(20), [20])[0] == pytest.approx(HIT), "what is too long loses its beginning"
    assert (scorer.eot_token_id, scorer.prefix_token_id, scorer.max_length) == (257, 256, 8)


def test_answers_end_where_the_task_says() -> None:
    scorer: Any = Scorer(Counting())
    letters = scorer.tokenizer.decode(range(66, 74))
    how = {"until": [letters[3:5]], "max_gen_toks": 6}
    prompt = scorer.tokenizer.decode([64, 65])
    asked = [SimpleNamespace(args=(prompt, how)), SimpleNamespace(args=(prompt, {"max_gen_toks": 4}))]
    assert scorer.generate_until(asked) == [letters[:3], letters[:4]]
    with pytest.raises(errors.UsageError, match="a task that samples"):
        scorer.generate_until([SimpleNamespace(args=(prompt, {"do_sample": True, "temperature": 0.7}))])


def test_a_text_begins_with_what_the_tokenizer_puts_in_front() -> None:
    """As in the harness's own ``hf``: Gemma without its first token is far off."""
    scorer: Any = Scorer(Counting())
    assert scorer.tok_encode("ab") == list(tiny_tokenizer()("ab").input_ids)
    scorer.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    plain = list(tiny_tokenizer()("ab").input_ids)
    assert scorer.tok_encode("ab") == [256, *plain]
    assert scorer.tok_encode("<s>ab") == [256, *plain], "a rendered chat has it already"
    assert scorer.tok_encode("ab", add_special_tokens=False) == plain


def test_what_is_too_long_is_said() -> None:
    scorer: Any = Scorer(Counting())
    scorer.note_cut()  # says nothing
    scorer._score(range(20), [20])
    scorer.generate_until([SimpleNamespace(args=("abcdefg", {"max_gen_toks": 4, "until": [""]}))])
    with pytest.warns(Note, match="2 texts of the tasks do not fit 8 positions"):
        scorer.note_cut()


def test_the_logits_of_every_position_are_needed() -> None:
    scorer: Any = Scorer(Counting(last_only=True))
    with pytest.raises(errors.UsageError, match="gives the logits of the last position only"):
        scorer._score([3], [4, 5])


def test_a_harness_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(errors.MissingError, match="pip install"):
        evaluate_tasks(Counting(), HarnessOptions(tasks=("wikitext",)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--text is missing"),
        (["--tasks", "wikitext", "--text", "a.txt"], "bring their own texts"),
        (["--text", "a.txt", "--limit", "3"], "belong to --tasks"),
        (["--tasks", "wikitext", "--max-tokens", "99"], "--max-tokens belongs to --text"),
        (["--tasks", "wikitext", "--chat"], "--chat belongs to --text"),
    ],
)
def test_a_text_or_tasks(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("eval", "nothing", *flags) == errors.USAGE
    assert said in capsys.readouterr().err
