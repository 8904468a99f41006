"""Text to fixed-length windows of tokens, each beginning as a prompt of the model does; or windows that it samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankbook.calibration import text as reading
from rankbook.calibration.model.adapter import adapter_of
from rankbook.calibration.model.continuation import Continuation
from rankbook.calibration.notes import note
from rankbook.calibration.text import Text, pieces, plain_text, read_text, sample_pieces

_SAMPLING_BATCH = 16
_PROBE = 64
"""Characters that are enough to see which special tokens a tokenizer puts around a text."""


@dataclass(frozen=True)
class CalibrationData:
    """Windows of tokens and where they came from.

    Attributes:
        tokens: (sequences, length) int64.
        description: One line for reports, e.g. ``64 windows x 512 tokens of calib.txt``.
    """

    tokens: Tensor
    description: str


@dataclass(frozen=True)
class Windows:
    """Windows of a text.

    Attributes:
        tokens: (windows, length) int64.
        prefix: Special tokens with which the tokenizer begins a text, and so each window.
        suffix: Those with which it ends a text; no window has them, since the text goes on behind it.
    """

    tokens: Tensor
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def describe(self, tokenizer: Any) -> dict[str, Any]:
        """Return what the windows are made of, for reports in JSON."""
        count, length = self.tokens.shape
        return {
            "count": count,
            "length": length,
            "text_tokens": count * (length - len(self.prefix)),
            "prefix": {"ids": list(self.prefix), "tokens": tokenizer.convert_ids_to_tokens(list(self.prefix))},
            "suffix_left_out": list(self.suffix),
        }


def calibration_batches(
    tokenizer: Any,
    source: str | Path | None,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    model: Any = None,
    chat: bool = False,
) -> CalibrationData:
    """Return ``sequences`` windows of ``length`` tokens, or as many as the text has, which is said in a `Note`.

    Args:
        tokenizer: Of the model; needed for text.
        source: See `read_text`; None samples from ``model``.
        sequences: Windows wanted. A text with more is sampled without replacement; of one beyond
            `rankbook.calibration.text.MOST_PIECES` pieces, those are chosen first, so that memory is bounded.
        length: Tokens per window, special tokens in front of them included.
        seed: Of the choice of windows and of the sampling.
        model: The unquantized model, for sampling.
        chat: The text holds chats; the model's template is applied.

    Raises:
        ValueError: No text, less text than one window, no tokenizer for a text, or token ids outside the vocabulary.
    """
    if source is None:
        if model is None:
            raise ValueError("no calibration text is given and there is no model to sample one from; give a text")
        prefix = () if tokenizer is None else special_tokens(tokenizer, "0")[0]
        tokens = sample_from_model(model, sequences, length, seed, prefix)
        about = (
            f"{sequences} windows x {length} tokens sampled from the model itself; a text of your own may fit better"
        )
        return CalibrationData(tokens, about)
    text = read_text(source, chat=chat)
    _require(tokenizer)
    most = max(reading.MOST_PIECES, 16 * sequences * length // reading.PIECE)
    chosen, count = sample_pieces(pieces(text.parts(tokenizer)), most, seed)
    found = _windows(tokenizer, chosen, length, text.name)
    tokens = found.tokens
    if tokens.shape[1] < length:
        raise ValueError(
            f"{source} has {tokens.numel() - len(found.prefix)} tokens, less than one calibration window of {length};"
            " give a longer text (some thousand words), or fewer tokens per window"
        )
    about = f" of {source}" + (" in the model's chat template" if chat else "")
    if count > len(chosen):
        about += f" (chosen from {len(chosen)} of its {count} parts)"
    if len(tokens) < sequences:
        note(f"{source} is short: {len(tokens)} of {sequences} calibration windows of {length} tokens; give more text")
        about += f"; {sequences} windows were asked for, the text has no more"
    if len(tokens) > sequences:
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        tokens = tokens[order[:sequences].sort().values]
    _check_vocabulary(tokens, model)
    return CalibrationData(tokens.long(), f"{tokens.shape[0]} windows x {length} tokens{about}")


def token_windows(tokenizer: Any, text: Text | str, length: int, *, most: int | None = None) -> Windows:
    """Cut the beginning of a text into non-overlapping windows of ``length`` tokens; the remainder is dropped.

    Where the tokenizer puts special tokens in front of a text, each window begins with them (and holds as many tokens
    of text less): models trained so, like Gemma, are far off without. A text with fewer tokens gives one short window.

    Args:
        tokenizer: Of the model.
        text: The text.
        length: Tokens of a window, two of them text or more.
        most: Windows wanted; no more is read and tokenized. None takes all.

    Raises:
        ValueError: No tokenizer, or fewer than two tokens.
    """
    _require(tokenizer)
    text = plain_text(text) if isinstance(text, str) else text
    found = _windows(tokenizer, pieces(text.parts(tokenizer)), length, text.name, most)
    return Windows(found.tokens.long(), found.prefix, found.suffix)


def special_tokens(tokenizer: Any, probe: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that a tokenizer puts before and behind a text, found by trying it on ``probe``."""
    whole, inside = list(tokenizer(probe)["input_ids"]), _ids(tokenizer, probe)
    for begin in range(len(whole) - len(inside) + 1):
        if whole[begin : begin + len(inside)] == inside:
            return tuple(whole[:begin]), tuple(whole[begin + len(inside) :])
    raise ValueError(
        f"the tokenizer changes a text where it adds special tokens ({inside} becomes {whole}), so windows cannot begin"
        " as a prompt does; repair the post-processor in its tokenizer.json"
    )


def sample_from_model(model: Any, sequences: int, length: int, seed: int, prefix: Sequence[int] = ()) -> Tensor:
    """Sample windows (sequences, length) int64 from the model (temperature 1).

    They begin with ``prefix``, what the tokenizer puts in front of a text; without one with the model's start token;
    without that with a random one, as in LLM-QAT (Liu et al. 2023, section 3.1). Sampling goes on after an end token,
    as documents follow each other in training text.
    """
    adapter, generator = adapter_of(model), torch.Generator().manual_seed(seed)
    if not prefix and adapter.start_token is not None:
        prefix = (adapter.start_token,)
    batches = []
    for begin in range(0, sequences, _SAMPLING_BATCH):
        rows = min(_SAMPLING_BATCH, sequences - begin)
        if prefix:
            first = torch.tensor(prefix[:length]).expand(rows, -1)
        else:
            first = torch.randint(0, adapter.vocabulary, (rows, 1), generator=generator)
        batches.append(_sample_batch(model, first, length, generator))
    return torch.cat(batches)


@torch.no_grad()
def _sample_batch(model: Any, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    tokens, text = [first], Continuation(model)
    for _ in range(length - first.shape[1]):
        probabilities = text.extend(tokens[-1]).softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(tokens, dim=1)


def _windows(tokenizer: Any, found: Iterable[str], length: int, name: str, most: int | None = None) -> Windows:
    """Cut pieces into at most ``most`` windows, int32; one short window where there is less text than that."""
    source = iter(found)
    first = next((piece for piece in source if piece.strip()), None)
    if first is None:
        raise ValueError(f"{name} is empty; give a file with some thousand words of text like that of the model's use")
    prefix, suffix = special_tokens(tokenizer, first[:_PROBE].strip())
    payload = length - len(prefix)
    if payload < 1:
        raise ValueError(
            f"windows of {length} tokens have no room behind {len(prefix)} special tokens; make them longer"
        )
    blocks: list[Tensor] = []
    rest, windows = torch.empty(0, dtype=torch.int32), 0
    for ids in _tokenized(tokenizer, first, source, prefix):
        rest = torch.cat([rest, ids])
        whole = min(len(rest) // payload, len(rest) if most is None else most - windows)
        if whole:
            blocks.append(rest[: whole * payload].view(whole, payload))
            rest, windows = rest[whole * payload :].clone(), windows + whole
        if most is not None and windows >= most:
            break
    if not blocks:
        if not len(rest) or len(rest) + len(prefix) < 2:
            raise ValueError(f"{name} has {len(rest)} tokens; at least 2 are needed, some thousand are useful")
        blocks = [rest[None]]
    body = torch.cat(blocks)
    start = torch.tensor(prefix, dtype=torch.int32).expand(len(body), len(prefix))
    return Windows(torch.cat([start, body], dim=1), prefix, suffix)


def _tokenized(tokenizer: Any, first: str, others: Iterator[str], prefix: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the tokens of each piece as if they were one text, without special tokens, int32.

    A rendered chat begins with the prefix as text; there it is left out, since each window has it.
    """
    head = _ids(tokenizer, first)
    yield torch.tensor(
        head[len(prefix) :] if prefix and head[: len(prefix)] == list(prefix) else head, dtype=torch.int32
    )
    # Tokenizers of the SentencePiece kind put a space in front of every text; there the piece's own is one too many.
    whole, word = _ids(tokenizer, "one two"), _ids(tokenizer, "one")
    drop = whole != word + _ids(tokenizer, " two") and whole == word + _ids(tokenizer, "two")
    for piece in others:
        yield torch.tensor(_ids(tokenizer, piece[1:] if drop and piece[0] == " " else piece), dtype=torch.int32)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _require(tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError("the model has no tokenizer, so text cannot be used; add tokenizer.json to its folder")


def _check_vocabulary(tokens: Tensor, model: Any) -> None:
    if model is None:
        return
    size = adapter_of(model).vocabulary
    if int(tokens.max()) >= size:
        raise ValueError(
            f"the tokenizer gives token {int(tokens.max())}, the model knows {size}: they do not belong together"
        )
