"""What a model's generation configuration asks for: when a text ends, which tokens are not allowed, how to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankbook.calibration.schema import read_object
from rankbook.tools.errors import UsageError

if TYPE_CHECKING:
    from rankbook.tools.runtimes.base import Logits

_NEUTRAL: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,  # what transformers takes where a model says nothing
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": None,
    "sequence_bias": None,
    "guidance_scale": None,
}
"""Settings that are not taken by themselves, with the value that changes nothing."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Of these, the ones that a model means only where it samples."""


@dataclass(frozen=True)
class GenerationSettings:
    """What `transformers` would obey in a greedy generation, and what it would sample with.

    Attributes:
        end_tokens: Each of them ends a text.
        stop_strings: Each of them ends a text, and is not part of it.
        suppressed: Tokens that are never chosen.
        suppressed_first: Tokens that are not chosen first.
        bad_words: Sequences of tokens that are never completed.
        forced_first: The token after a prompt of a single token, or None.
        forced_last: The last token where the number of tokens ends a text, or None.
        suggested: Settings of sampling and penalties that the model comes with; they are offered, not taken.
    """

    end_tokens: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_first: int | None = None
    forced_last: int | None = None
    suggested: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any], tokenizer: Any) -> GenerationSettings:
        """Read the fields of a generation configuration; the end token of the tokenizer counts too.

        Raises:
            UsageError: A field does not hold what it should.
        """
        try:
            ends = {*_tokens(given.get("eos_token_id")), *_tokens(getattr(tokenizer, "eos_token_id", None))}
            stops = given.get("stop_strings") or ()
            stops = [stops] if isinstance(stops, str) else [str(stop) for stop in stops]
            # Special tokens are not part of the decoded text.
            tokens, ids = (getattr(tokenizer, f"all_special_{what}", ()) for what in ("tokens", "ids"))
            special = dict(zip(tokens, ids, strict=False))
            words = tuple(tuple(map(int, word)) for word in given.get("bad_words_ids") or ())
            first, last = (_tokens(given.get(f"forced_{name}_token_id")) for name in ("bos", "eos"))
            return cls(
                end_tokens=frozenset(ends | {special[stop] for stop in stops if stop in special}),
                stop_strings=tuple(stop for stop in stops if stop not in special),
                suppressed=frozenset(_tokens(given.get("suppress_tokens"))),
                suppressed_first=frozenset(_tokens(given.get("begin_suppress_tokens"))),
                bad_words=tuple(word for word in words if word and word not in {(end,) for end in ends}),
                forced_first=next(iter(first), None),
                forced_last=next(iter(last), None),
                suggested=_suggested(given),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"the model's generation_config.json is damaged ({error}); copy the model again") from None

    def allow(self, scores: Logits, before: Sequence[int], produced: int, *, last: bool) -> Logits:
        """Return logits (vocabulary,) in which tokens that are not allowed are minus infinity.

        Args:
            scores: Logits of the next token.
            before: All tokens so far, the prompt's too.
            produced: How many of them are new.
            last: No token will follow.
        """
        import numpy as np

        forced = self.forced_last if last else self.forced_first if len(before) == 1 else None
        banned = {*self.suppressed, *(() if produced else self.suppressed_first)}
        for *start, end in self.bad_words:
            if list(before[len(before) - len(start) :]) == start:
                banned.add(end)
        if forced is None and not banned:
            return scores
        allowed = scores.copy()
        allowed[[token for token in banned if token < len(allowed)]] = -np.inf
        if forced is not None:
            allowed[:] = -np.inf
            allowed[forced] = 0
        return allowed

    @property
    def restricts(self) -> bool:
        """Whether `allow` ever changes logits."""
        forced = self.forced_first is not None or self.forced_last is not None
        return forced or bool(self.suppressed or self.suppressed_first or self.bad_words)

    def advice(self) -> str:
        """Return a sentence about what the model suggests and is not taken, or an empty one."""
        if not self.suggested:
            return ""
        flags = {"temperature": "--temperature", "top_p": "--top-p", "top_k": "--top-k"}
        offered = [f"{flags[name]} {value}" for name, value in self.suggested.items() if name in flags]
        others = [f"{name} {value}" for name, value in self.suggested.items() if name not in flags]
        parts = [f"give {' '.join(offered)} to follow it"] if offered else []
        parts += [f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} not served"] if others else []
        return f"the model suggests settings that are not taken by themselves: {'; '.join(parts)}"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the generation configuration of an exported folder.

    Where there is none, the end tokens of config.json, as transformers does.

    Raises:
        UsageError: A file is not valid JSON.
    """
    return read_json(folder / "generation_config.json") or {
        key: value for key, value in read_json(folder / "config.json").items() if key == "eos_token_id"
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no file.

    Raises:
        SchemaError: It holds something else.
    """
    return read_object(path, "copy the model again") if path.is_file() else {}


def _tokens(value: Any) -> list[int]:
    return [] if value is None else [int(token) for token in (value if isinstance(value, (list, tuple)) else [value])]


def _suggested(given: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in _NEUTRAL if name not in _SAMPLING or given.get("do_sample")]
    return {name: given[name] for name in names if given.get(name) not in (None, _NEUTRAL[name])}
