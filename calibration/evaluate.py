"""Judging a model by its outputs: perplexity, divergence from a reference, and agreement on the likeliest token.

Works on anything that turns tokens into logits, so that PyTorch models and ONNX files are judged by the same code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LogitsFunction = Callable[[Tensor], Any]
"""Tokens (windows, length) int64 to logits (windows, length, vocabulary), as a tensor or a numpy array."""

POSITIONS_AT_ONCE = 128
"""Positions whose probabilities are in memory at once."""


@dataclass(frozen=True)
class EvalResult:
    """How well a model predicts.

    Attributes:
        perplexity: Exponential of the mean negative log-likelihood of each token of a window but its first, or the
            special tokens with which it begins.
        kl: Mean over the same positions of KL(reference || model) in nats, None without a reference.
        top1_agreement: Share of the positions where both find the same token likeliest, None without a reference.
        tokens: Tokens predicted.
        seconds: Wall time of the model under test, the reference's not included.
        reference_perplexity: The reference's own, None without a reference.
        windows: What was evaluated on, see `rankbook.calibration.data.Windows.describe`; empty where the caller knows.
    """

    perplexity: float
    kl: float | None
    top1_agreement: float | None
    tokens: int
    seconds: float
    reference_perplexity: float | None = None
    windows: Mapping[str, Any] = field(default_factory=dict)


def evaluate(
    logits_fn: LogitsFunction,
    windows: Tensor,
    reference_logits_fn: LogitsFunction | None = None,
    *,
    batch: int = 1,
    given: int = 1,
    progress: Callable[[float], None] | None = None,
) -> EvalResult:
    """Evaluate a model on non-overlapping windows; every window is seen without those before it.

    Only the logits of ``batch`` windows (twice, with a reference) are in memory at once. Sums are in float64 and in
    the order of the windows, so the result repeats exactly where the logits do.

    Args:
        logits_fn: The model.
        windows: (windows, length) int64, see `rankbook.calibration.data.token_windows`.
        reference_logits_fn: The unquantized model, on the same tokens.
        batch: Windows per call.
        given: Tokens at the begin of a window that are not predicted: the first, or all special tokens in front.
        progress: Called with the fraction done.

    Raises:
        ValueError: No windows, windows of fewer than two tokens, or logits of the wrong shape, or NaN.
    """
    given = max(given, 1)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < given + 1:
        raise ValueError(
            f"windows have shape {tuple(windows.shape)}; give at least one window of at least {given + 1} tokens"
        )
    sums = torch.zeros(4, dtype=torch.float64)
    seconds = 0.0
    for done, tokens in enumerate(torch.split(windows, batch)):
        start = time.monotonic()
        logits = _logits(logits_fn, tokens)
        seconds += time.monotonic() - start
        sums += _sums(
            logits, None if reference_logits_fn is None else _logits(reference_logits_fn, tokens), tokens, given
        )
        if progress is not None:
            progress(min(1.0, (done + 1) * batch / len(windows)))
    count = windows.shape[0] * (windows.shape[1] - given)
    loss, kl, agreement, reference_loss = (float(value) / count for value in sums)
    for name, value in (("model", loss), ("reference", reference_loss)):
        if math.isnan(value):
            raise ValueError(
                f"the {name} gives logits that are NaN: its activations overflow (export with --dtype fp32 where it is"
                " fp16), or its weights are damaged"
            )
    if reference_logits_fn is None:
        return EvalResult(_perplexity(loss), None, None, count, seconds)
    return EvalResult(_perplexity(loss), kl, agreement, count, seconds, _perplexity(reference_loss))


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # exp overflows a double beyond 709


def _logits(function: LogitsFunction, tokens: Tensor) -> Tensor:
    logits = torch.as_tensor(function(tokens))
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} for tokens {tuple(tokens.shape)}; a model that gives logits for"
            " every position is needed (an ONNX file exported with --logits all)"
        )
    return logits


def _sums(logits: Tensor, reference: Tensor | None, tokens: Tensor, given: int) -> Tensor:
    """Return the sums over positions of loss, divergence, agreement and the reference's loss, float64 (4,)."""
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(
            f"the model gives logits {tuple(logits.shape)}, the reference {tuple(reference.shape)}:"
            " they do not share a vocabulary and cannot be compared"
        )
    vocabulary = logits.shape[-1]
    flat = logits[:, given - 1 : -1].reshape(-1, vocabulary)
    wanted = tokens[:, given:].reshape(-1)
    other = None if reference is None else reference[:, given - 1 : -1].reshape(-1, vocabulary)
    sums = torch.zeros(4, dtype=torch.float64)
    for begin in range(0, len(flat), POSITIONS_AT_ONCE):
        part = slice(begin, begin + POSITIONS_AT_ONCE)
        log_q = flat[part].float().log_softmax(-1)
        sums[0] -= log_q.gather(1, wanted[part, None]).double().sum()
        if other is not None:
            log_p = other[part].float().log_softmax(-1)
            # Where the reference gives no probability at all (a masked token), the term is 0, not 0 * infinity.
            terms = torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))
            sums[1] += terms.sum(-1).double().sum()
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            sums[3] -= log_p.gather(1, wanted[part, None]).double().sum()
    return sums
