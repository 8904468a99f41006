"""Requests and answers as the OpenAI API has them; what is not served is refused by name, never ignored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankbook.tools.generation.loop import GenerateOptions
from rankbook.tools.generation.stream import UNFINISHED

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are not served, with the values that ask for nothing, beside null."""
HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
"""Fields that change no answer."""
REASONS = {"stop": "stop", "length": "length", "context": "length"}
"""How this project's reasons are called there."""
MOST_TOP = 20


class RefusedError(Exception):
    """A request that is not answered.

    Attributes:
        status: The HTTP status.
        kind: The type of the error in the API's words.
        param: The field that is wrong, or None.
    """

    def __init__(
        self, message: str, status: int = 400, kind: str = "invalid_request_error", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        """Return the error as the API writes it."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": None}}


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Asked(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    ignore_eos: bool = False  # of other servers, too; for benchmarks

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Leave out fields that are null, which is the default; ``max_tokens`` null asks for as many as are allowed."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name == "max_tokens"}

    @model_validator(mode="after")
    def _only_what_is_served(self) -> _Asked:
        for name, value in (self.model_extra or {}).items():
            if name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                neutral = NEUTRAL.get(name, ({},))[0]  # nothing to be named where it is empty
                other = f" other than {json.dumps(neutral)}" if neutral not in ({}, []) else ""
                raise ValueError(f"{name}{other} is not served")
        if self.stop is not None and len(self.stops) > 4:
            raise ValueError("stop holds more than 4 strings")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the text."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))

    def generate_options(self, max_new_tokens: int) -> GenerateOptions:
        """Return how to continue; without a seed each text has another one."""
        seed = self.seed if self.seed is not None else uuid.uuid4().int % 2**32
        return GenerateOptions(
            max_new_tokens=max_new_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )


class Completion(_Asked):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are told with each; None where no probability is asked for."""
        return self.logprobs


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_served(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if value and name not in cls.model_fields:  # answers that come back hold empty fields
                raise ValueError(f"{name} is not served")
        return given

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> dict[str, str]:
        """What the chat template is given."""
        turn = {"role": self.role.replace("developer", "system"), "content": self.text}
        return turn | ({"name": self.name} if self.name else {})


class Chat(_Asked):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens are told with each; None where no probability is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[_Asked], body: bytes) -> Any:
    """Return a request.

    Raises:
        RefusedError: It is malformed, or asks for something that is not served.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Of several types that are allowed the one that was meant fails furthest inside; types are no part of a place.
        wrong = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
        places = [part for part in map(str, wrong["loc"]) if part != "str" and not part.startswith("list[")]
        where, text = ".".join(places) or None, wrong["msg"].removeprefix("Value error, ")
        raise RefusedError(f"{where}: {text}" if where else text, param=where) from None


class Writer:
    """Writes the answers to one request.

    Attributes:
        usage: Tokens of the prompts, and of the answers so far.
    """

    def __init__(self, asked: _Asked, tokenizer: Any) -> None:
        self._chat = isinstance(asked, Chat)
        self._asked, self._tokenizer = asked, tokenizer
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

    def count(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count tokens."""
        self.usage["prompt_tokens"] += prompt
        self.usage["completion_tokens"] += completion
        self.usage["total_tokens"] += prompt + completion

    def whole(self, texts: Sequence[str], reasons: Sequence[str], pieces: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the whole answer, from the text, reason and pieces of each choice."""
        choices = []
        for index, (text, reason, told) in enumerate(zip(texts, reasons, pieces, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            logprobs = self._logprobs(told)
            choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": REASONS[reason]})
        return {**self._head(""), "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return (
            [self._chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})] if self._chat else []
        )

    def piece(self, index: int, piece: Any) -> dict[str, Any]:
        """Return a part of a streamed answer."""
        reason = REASONS.get(piece.finish_reason)
        content = (
            {"delta": {"content": piece.text} if piece.text or not reason else {}}
            if self._chat
            else {"text": piece.text}
        )
        logprobs = self._logprobs([piece]) if piece.token is not None else None
        return self._chunk({"index": index, **content, "logprobs": logprobs, "finish_reason": reason})

    def closing(self) -> list[dict[str, Any]]:
        """Return what a stream ends with where the usage was asked for."""
        wanted = self._asked.stream_options is not None and self._asked.stream_options.include_usage
        return [{**self._head(".chunk" if self._chat else ""), "choices": [], "usage": self.usage}] if wanted else []

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(".chunk" if self._chat else ""), "choices": [{"index": 0, "logprobs": None, **choice}]}

    def _head(self, end: str) -> dict[str, Any]:
        kind = f"chat.completion{end}" if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _logprobs(self, pieces: Sequence[Any]) -> dict[str, Any] | None:
        asked: Any = self._asked
        told = [piece for piece in pieces if piece.token is not None]
        if asked.top is None:
            return None
        if self._chat:
            return {"content": [self._entry(p.token, p.logprob, p.top) for p in told], "refusal": None}
        return {
            "tokens": [self._text(piece.token) for piece in told],
            "token_logprobs": [piece.logprob for piece in told],
            # Of tokens with one text, such as bytes that are no character alone, the likeliest.
            "top_logprobs": [{self._text(token): value for token, value in reversed(piece.top)} for piece in told],
            "text_offset": [],
        }

    def _entry(self, token: int, logprob: float, top: Sequence[tuple[int, float]] | None = None) -> dict[str, Any]:
        text = self._text(token)
        known = UNFINISHED not in text  # bytes that are no character alone are not told by it
        entry: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}
        if top is not None:
            entry["top_logprobs"] = [self._entry(item, value) for item, value in top]
        return entry

    def _text(self, token: int) -> str:
        text: str = self._tokenizer.decode([token])
        return text


def event(content: Mapping[str, Any] | str) -> str:
    """Return one server-sent event."""
    return f"data: {content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)}\n\n"
