"""Measures how many tokens a second `rankbook serve` gives to several clients at once, over HTTP.

    rankbook serve model-onnx --kernels native-int8 --max-context 2048 &
    python -m rankbook.tools.dev.serve_load http://127.0.0.1:8000/v1 --clients 1 2 4 8

Every client asks for as many greedy completions as it gets turns, each of a prompt of its own, streamed unless
``--whole`` is given. The numbers of clients take turns, so that a noisy machine falls on all alike. The clients run in
this process: on a machine with few cores they take some of the server's time, as they would for a user; a stream is a
message for each token, and takes most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rankbook.tools import errors
from rankbook.tools.report import Table

_TOPICS = "rivers bridges clocks bread maps winter music stone glass boats paper lamps roads seeds wool tides".split()
"""Of the prompts, so that no two texts that are decoded side by side are the same."""


@dataclass(frozen=True)
class Load:
    """What a number of clients got.

    Attributes:
        clients: That ask at once.
        tokens_per_second: Of all together: median over the turns, from the first request to the last token.
        first_token_seconds: Median time to the first token of a text, or to its end where it is not streamed.
        speed: ``tokens_per_second`` relative to the smallest number of clients.
    """

    clients: int
    tokens_per_second: float
    first_token_seconds: float
    speed: float = 1.0


def measure(
    client: Any, model: str, counts: Sequence[int], *, turns: int, tokens: int, stream: bool = True
) -> list[Load]:
    """Ask with each number of clients in turn.

    Args:
        client: Of the ``openai`` package.
        model: Name of the served model.
        counts: Numbers of clients.
        turns: For each.
        tokens: New tokens of a text.
        stream: Whether they are sent one by one.
    """
    rates: dict[int, list[float]] = {count: [] for count in counts}
    waits: dict[int, list[float]] = {count: [] for count in counts}

    def ask(number: int) -> tuple[int, float]:
        prompt = f"Write a long story about {_TOPICS[number % len(_TOPICS)]} and number {number}."
        start, first, produced = time.perf_counter(), 0.0, 0
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}, **more
        )
        for chunk in answer if stream else [answer]:
            first = first or time.perf_counter() - start
            produced = chunk.usage.completion_tokens if chunk.usage else produced
        return produced, first

    ask(0)  # what is prepared at the first request is no part of the time
    for _ in range(turns):
        for count in counts:
            with ThreadPoolExecutor(count) as pool:
                start = time.perf_counter()
                answers = list(pool.map(ask, range(count)))
                rates[count].append(sum(produced for produced, _ in answers) / (time.perf_counter() - start))
            waits[count] += [first for _, first in answers]
    base = statistics.median(rates[min(counts)])
    found = {count: statistics.median(rates[count]) for count in counts}
    return [Load(count, rate, statistics.median(waits[count]), rate / base) for count, rate in found.items()]


def main(words: Sequence[str] | None = None) -> int:
    """Measure a running server and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the server, with /v1 at its end")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="for each number of clients")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens of a text")
    parser.add_argument("--whole", action="store_true", help="ask for whole texts, and not for streams of tokens")
    parser.add_argument("--api-key", default="none", metavar="KEY")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    try:
        import openai
    except ImportError:
        print("error: the client is not installed: pip install openai", file=sys.stderr)
        return errors.MISSING
    client = openai.OpenAI(base_url=given.url, api_key=given.api_key, max_retries=0)
    try:
        model = next(iter(client.models.list())).id
    except openai.OpenAIError as error:
        print(f"error: {given.url} does not answer: {error}; start `rankbook serve` and name its port", file=sys.stderr)
        return errors.USAGE
    found = measure(client, model, given.clients, turns=given.turns, tokens=given.tokens, stream=not given.whole)
    if given.json:
        print(json.dumps([asdict(load) for load in found]))
        return errors.OK
    rows = [
        (load.clients, f"{load.tokens_per_second:.0f}", f"{load.first_token_seconds * 1e3:.0f}", f"{load.speed:.2f}")
        for load in found
    ]
    wait = "ms to the end" if given.whole else "ms to the first"
    Table(f"{model}, {given.tokens} tokens a text", ("clients", "tokens/s", wait, "speed"), rows).show(sys.stdout)
    return errors.OK


if __name__ == "__main__":
    sys.exit(main())
