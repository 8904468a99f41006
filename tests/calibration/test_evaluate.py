"""The three numbers against their definitions, and the conditions under which they are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from rankbook.calibration import evaluate as ev
from tests.tiny import tiny_model

WINDOWS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(0))


def table_model(seed: int) -> ev.LogitsFunction:
    """Logits that depend on the token alone."""
    table = 3 * torch.randn(11, 11, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: table[tokens]


def test_numbers_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ev, "POSITIONS_AT_ONCE", 4)  # parts that end within a window
    model, reference = table_model(1), table_model(2)
    result = ev.evaluate(model, WINDOWS, reference, batch=2)
    losses, divergences, agreements = [], [], []
    for window in WINDOWS:
        q, p = model(window).double().softmax(-1), reference(window).double().softmax(-1)
        for t in range(len(window) - 1):
            losses.append(-math.log(q[t, window[t + 1]]))
            divergences.append(float((p[t] * (p[t] / q[t]).log()).sum()))
            agreements.append(float(q[t].argmax() == p[t].argmax()))
    # The code works in float32: relative rounding 6e-8 per term.
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.kl == pytest.approx(np.mean(divergences), rel=1e-5)
    assert result.reference_perplexity == ev.evaluate(reference, WINDOWS).perplexity
    assert result.top1_agreement == np.mean(agreements)
    assert result.tokens == 18


def test_a_model_against_itself() -> None:
    result = ev.evaluate(table_model(1), WINDOWS, table_model(1))
    assert result.kl == 0
    assert result.top1_agreement == 1


def test_batch_size_and_repetition_do_not_matter() -> None:
    results = [ev.evaluate(table_model(1), WINDOWS, table_model(2), batch=b) for b in (1, 2, 3, 3)]
    assert len({(r.kl, r.top1_agreement, r.tokens) for r in results[2:]}) == 1
    assert results[0].perplexity == pytest.approx(results[2].perplexity, rel=1e-6)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary() -> None:
    result = ev.evaluate(lambda tokens: np.zeros((*tokens.shape, 11), np.float16), WINDOWS)
    assert result.perplexity == pytest.approx(11, rel=1e-5)
    assert result.kl is None
    assert result.reference_perplexity is None
    assert result.top1_agreement is None


def test_special_tokens_in_front_are_given_not_predicted() -> None:
    model, reference = table_model(1), table_model(2)
    windows = torch.cat([torch.tensor([[3, 4]] * 3), WINDOWS], dim=1)
    result = ev.evaluate(model, windows, reference, given=2)
    losses = [
        float(-model(window).double().log_softmax(-1)[t - 1, window[t]]) for window in windows for t in range(2, 9)
    ]
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.tokens == 21
    assert ev.evaluate(model, WINDOWS, given=0) == replace(ev.evaluate(model, WINDOWS), seconds=ANY)


def test_masked_tokens_do_not_give_nan() -> None:
    def masked(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = table_model(1)(tokens).clone()
        logits[..., 10] = -math.inf
        return logits

    result = ev.evaluate(masked, WINDOWS.clamp(max=9), masked)
    assert result.kl == 0


def test_a_transformers_model() -> None:
    model = tiny_model("llama")
    windows = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        result = ev.evaluate(lambda tokens: model(input_ids=tokens).logits, windows)
    want = math.exp(float(np.mean([model(w[None], labels=w[None]).loss.item() for w in windows])))
    assert result.perplexity == pytest.approx(want, rel=1e-5)


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    ev.evaluate(table_model(1), WINDOWS, batch=2, progress=told.append)
    assert told == [2 / 3, 1.0]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one window"):
        ev.evaluate(table_model(1), WINDOWS[:0])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ev.evaluate(table_model(1), WINDOWS[:, :1])
    with pytest.raises(ValueError, match="--logits all"):
        ev.evaluate(lambda tokens: table_model(1)(tokens)[:, -1:], WINDOWS)
    with pytest.raises(ValueError, match="vocabulary"):
        ev.evaluate(table_model(1), WINDOWS, lambda tokens: torch.zeros(*tokens.shape, 12))
