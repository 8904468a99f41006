"""What requests may say, as clients of OpenAI's API write them, and what answers tell."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic")
from rankbook.tools.serve.protocol import Chat, Completion, RefusedError, Writer, parse
from rankbook.tools.serve.scheduler import Piece

TURN = {"role": "user", "content": "x"}
NULLS = (
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
    "tools",
    "suffix",
    "top_k",
)


def asked(kind: type[Completion | Chat], **fields: Any) -> Any:
    return parse(kind, json.dumps({"model": "tiny", **fields}).encode())


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(NULLS)
    assert asked(Completion, prompt="a", **nulls) == asked(Completion, prompt="a")
    assert asked(Chat, messages=[TURN], **nulls) == asked(Chat, messages=[TURN])
    assert asked(Completion, prompt="a", max_tokens=None).max_tokens is None, "no limit but the server's"
    with pytest.raises(RefusedError, match="prompt: Field required"):
        asked(Completion, prompt=None)


def test_turns_that_come_back_hold_empty_fields() -> None:
    empty: dict[str, Any] = {"refusal": None, "annotations": [], "tool_calls": None, "audio": None}
    chat = asked(Chat, messages=[{"role": "developer", "content": "x", "name": "Ann"}, {**TURN, **empty}])
    assert [message.turn for message in chat.messages] == [{"role": "system", "content": "x", "name": "Ann"}, TURN]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "messages.0: tool_calls is not served"),
        ({"role": "tool", "content": "x"}, "messages.0.role: Input should be 'system', 'developer', 'user'"),
        ({**TURN, "content": [{"type": "image_url"}]}, "messages.0.content.0.type: Input should be 'text'"),
    ],
)
def test_a_refusal_names_what_is_wrong(message: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        asked(Chat, messages=[message])


def test_probabilities_of_bytes_that_are_no_character() -> None:
    """Of several tokens with one text the likeliest is told, and no bytes that are not its own."""
    top = tuple((token, -float(place)) for place, token in enumerate([65, 200, 66, 201, 202]))
    texts = {65: "A", 66: "B"}
    tokenizer = SimpleNamespace(decode=lambda ids: texts.get(ids[0], "\ufffd"))
    piece = Piece("", 200, -1.0, top)
    plain = Writer(asked(Completion, prompt="x", logprobs=5), tokenizer)._logprobs([piece])
    assert plain is not None
    assert plain["top_logprobs"] == [{"A": 0.0, "\ufffd": -1.0, "B": -2.0}]
    chat = Writer(asked(Chat, messages=[TURN], logprobs=True, top_logprobs=5), tokenizer)._logprobs([piece])
    assert chat is not None
    (entry,) = chat["content"]
    assert [item["bytes"] for item in entry["top_logprobs"]] == [[65], None, [66], None, None]
    assert (entry["bytes"], entry["logprob"]) == (None, -1.0)
