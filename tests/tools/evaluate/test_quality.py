"""``eval`` says what it evaluated on: special tokens in front of windows, and a text that was shorter than asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import processors

from rankbook.calibration.evaluate import evaluate
from rankbook.calibration.notes import Note
from rankbook.calibration.text import plain_text
from rankbook.tools.evaluate import quality
from rankbook.tools.evaluate.options import EvalOptions
from rankbook.tools.runtimes.base import LanguageModel
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from tests.tools.files import run_cli

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits, Tokens


def test_eval_begins_as_a_prompt_and_says_what_it_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> <s> $A", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("twenty-four bytes, or so")
    how = ["--context", 14, "--max-tokens", 42, "--json"]
    assert run_cli("eval", tmp_path / "model", "--text", tmp_path / "text.txt", *how) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["windows"] == {
        "count": 2,
        "length": 14,
        "text_tokens": 24,
        "prefix": {"ids": [257, 256], "tokens": ["</s>", "<s>"]},
        "suffix_left_out": [],
        "asked": {"context": 14, "max_tokens": 42},
    }
    assert report["tokens"] == 24  # all of the text, since both special tokens stand before it
    text: Any = tiny_tokenizer()("twenty-four bytes, or so").input_ids
    windows = torch.tensor([[257, 256, *text[:12]], [257, 256, *text[12:]]])
    with torch.no_grad():
        losses = model(windows).logits[:, 1:-1].double().log_softmax(-1).gather(2, windows[:, 2:, None])
    assert report["perplexity"] == pytest.approx(math.exp(-losses.mean()), rel=1e-5)
    said = "text.txt is short: evaluated on 2 x 14 tokens instead of 3 x 14"
    assert said in printed.err
    assert said in report["notes"][0]


def test_logits_that_are_nan_have_no_perplexity() -> None:
    windows = torch.arange(8).view(2, 4)
    right, wrong = torch.zeros(2, 2, 4, 8)
    wrong[1, 2, 3] = math.nan
    assert evaluate(lambda _: right, windows, lambda _: right, batch=2).perplexity == pytest.approx(8)
    with pytest.raises(ValueError, match="the model gives logits that are NaN"):
        evaluate(lambda _: wrong, windows, batch=2)
    with pytest.raises(ValueError, match="the reference gives logits that are NaN"):
        evaluate(lambda _: right, windows, lambda _: wrong, batch=2)


def test_windows_fit_the_reference_too() -> None:
    """Beyond the positions of a reference with rotary embeddings its logits are any numbers."""

    class Even(LanguageModel):
        def __init__(self, name: str, context: int | None) -> None:
            self.name, self.tokenizer, self._context = name, tiny_tokenizer(), context

        @property
        def context(self) -> int | None:
            return self._context

        def start(self, tokens: Tokens) -> Logits:
            return self.scores(tokens)[0, -1]

        def step(self, token: int) -> Logits:
            return self.start(np.array([[token]]))

        def scores(self, tokens: Tokens) -> Logits:
            return np.zeros((*tokens.shape, VOCABULARY), np.float32)

    text, options = plain_text("0123456789" * 4), EvalOptions(context=16)
    with pytest.warns(Note, match="short holds 8 positions: windows have 8 tokens instead of 16"):
        result = quality.evaluate(Even("long", 12), text, options, reference=Even("short", 8))
    assert result.windows["length"] == 8
    assert result.perplexity == pytest.approx(VOCABULARY)
