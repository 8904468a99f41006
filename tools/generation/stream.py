"""Text from tokens as they come: one decoder for every tokenizer, with bounded work for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer gives for the first bytes of a character whose other bytes come with the next token."""
_CONTEXT, _WINDOW, _MOST = 6, 16, 64
"""Tokens that are kept for what comes next, tokens from which on the others are dropped, and most tokens at once."""
_TAIL = 3
"""Characters behind a space, it included, that the next token may pull up to the word before: `` n't`` less one."""


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are what the tokenizer makes of all tokens.

    A decoded text is not always the beginning of a longer one: characters come in bytes, a sentence piece has its space
    in front but not at the start of a text, and a clean-up of spaces joins words with what follows. So a few tokens are
    decoded together, and what the next one may still change is held back.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = tuple(filter(None, stop_strings))
        self._ids: list[int] = []
        self._window: list[int] = []
        self._settled = ""  # of the window's text, what went on to `_emit`
        self._held = ""  # of that, what may begin a stop string
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """The text of all tokens, up to the stop string if one came."""
        return "".join(self._shown) if self.stopped else self._decode(self._ids)

    def push(self, token: int) -> str:
        """Take a token; return what can be shown from now on."""
        self._ids.append(token)
        self._window.append(token)
        text = self._decode(self._window)
        piece = self._settle(_stable(text) if len(self._window) < _MOST else text)
        shown = self._emit(piece, text[len(self._settled) :])
        self._shorten(text)
        return shown

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped:
            return ""
        shown = self._emit(self._settle(self._decode(self._window), end=True), "")
        held, self._held = self._held, ""
        return shown + ("" if self.stopped else held)

    def _settle(self, stable: str, *, end: bool = False) -> str:
        """Return what is new in the stable text of the window.

        Bytes that make no character take back, in some tokenizers, characters before them; shown is shown, so that the
        text goes on behind them. A character that is not complete does the same for a while, which is waited for.
        """
        both = zip(stable, self._settled, strict=False)
        same = next((i for i, (new, old) in enumerate(both) if new != old), min(len(stable), len(self._settled)))
        if same < len(self._settled) and len(stable) <= len(self._settled) and not end:
            return ""
        self._settled = stable
        return stable[same:]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _shorten(self, text: str) -> None:
        """Drop old tokens where the others, decoded alone, give the end of the text."""
        if len(self._window) < _WINDOW:
            return
        kept = self._window[-_CONTEXT:]
        end, pending = self._decode(kept), text[len(self._settled) :]
        if (text.endswith(end) and len(pending) < len(end)) or len(self._window) >= _MOST:
            self._window, self._settled = kept, end[: len(end) - len(pending)]

    def _emit(self, piece: str, pending: str) -> str:
        """Return what can be shown of ``piece``; ``pending`` is known but may change, yet it may end the text."""
        text = self._held + piece
        places = [at for stop in self._stop_strings if (at := (text + pending).find(stop)) >= 0]
        begun = [size for stop in self._stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size])]
        cut = min(places) if places else len(text) - max(begun, default=0)
        self.stopped, self._held = bool(places), text[cut:]
        self._shown.append((text + pending)[:cut])
        return self._shown[-1]


def _stable(text: str) -> str:
    """Return what the next token does not change."""
    text = text.rstrip(UNFINISHED)
    space = text.rfind(" ", max(0, len(text) - _TAIL))
    return text if space < 0 else text[:space]
