"""The server, asked by the real client of OpenAI's API."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankbook.tools import errors
from rankbook.tools.commands.serve import Serve, prepare
from rankbook.tools.dev import serve_load
from rankbook.tools.generation.loop import GenerateOptions, generate
from rankbook.tools.generation.settings import GenerationSettings
from rankbook.tools.runtimes import Setting, open_model
from rankbook.tools.runtimes.ort import native_unavailable
from rankbook.tools.serve.scheduler import Piece, Request, Scheduler
from rankbook.tools.serve.slots import Slots
from tests.tiny import tiny_model, tiny_tokenizer, write_text
from tests.tools.files import run_cli

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
PROMPTS = [
    f"the {word} " * count
    for word, count in zip("quick brown fox jumps over a lazy dog".split(), range(1, 9), strict=True)
]
CONTEXT = 96
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny exported model with a chat template."""
    work = tmp_path_factory.mktemp("served")
    tiny_model("llama", work / "model", head_dim=16)  # which the attention of both graphs takes
    write_text(work / "text.txt")
    config = json.loads((work / "model" / "tokenizer_config.json").read_text())
    (work / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    assert run_cli("quantize", work / "model", "--method", "rtn", "--bits", 4, "-o", work / "q", "--quiet") == 0
    export = ["export", work / "q", "-o", work / "tiny", "--graph", "static", "--max-context", CONTEXT, "--quiet"]
    assert run_cli(*export) == 0
    return work


class Server:
    """A server in a thread, with what it serves."""

    def __init__(self, served: Any) -> None:
        import uvicorn

        from rankbook.tools.serve.app import create_app

        self.served = served
        self._server = uvicorn.Server(uvicorn.Config(create_app(served), port=0, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert not self.served.scheduler.healthy

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def options(folder: Path, **more: Any) -> Serve:
    return Serve(**{"model": str(folder / "tiny"), "slots": 4, "queue": 40, "threads": 1, "no_native": True, **more})


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server with four slots."""
    with Server(prepare(options(folder))) as running:
        yield running


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, str]:
    """What `generate` makes of each prompt by itself, greedily."""
    model = open_model(str(folder / "tiny"), "bodies")
    chosen = GenerateOptions(max_new_tokens=12, ignore_eos=True)
    return {prompt: generate(model, prompt, chosen).text for prompt in PROMPTS}


def test_a_core_is_left_to_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int | None] = []

    def opened(model: str, kernels: str, setting: Setting, **more: Any) -> Any:
        chosen.append(setting.threads)
        return open_model(model, kernels, setting, **more)

    monkeypatch.setattr("rankbook.tools.commands.serve.open_model", opened)
    for cores, threads in ((4, None), (1, None), (4, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _process, cores=cores: set(range(cores)))
        prepare(options(folder, threads=threads)).scheduler.stop()
    assert chosen == [3, 1, 4]


GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def test_thirty_two_clients_at_once_get_what_each_would_get_alone(server: Server, alone: dict[str, str]) -> None:
    client = server.client()

    def ask(number: int) -> tuple[str, Any]:
        prompt = PROMPTS[number % len(PROMPTS)]
        if number == 5:  # goes away in the middle of a long answer
            stream = client.completions.create(**{**GREEDY, "max_tokens": 60, "prompt": prompt, "stream": True})
            next(iter(stream))
            stream.close()
            return "gone", None
        if number == 9:
            with pytest.raises(openai.BadRequestError, match="tokens and the context holds 96"):
                client.completions.create(**{**GREEDY, "prompt": "long " * 40})
            return "too long", None
        if number == 13:
            status, body = server.post("/v1/completions", b'{"model": "tiny", "prompt": ')
            assert status == 400
            return "malformed", body["error"]["type"]
        if number % 2:
            stream = client.completions.create(**{**GREEDY, "prompt": prompt, "stream": True})
            return prompt, "".join(chunk.choices[0].text for chunk in stream)
        return prompt, client.completions.create(**{**GREEDY, "prompt": prompt}).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    for prompt, text in answers:
        assert text == alone.get(prompt, text)
    assert {"gone", "too long", "malformed"} <= {prompt for prompt, _ in answers}
    assert ("malformed", "invalid_request_error") in answers
    until(lambda: server.served.scheduler.counters.active == 0)
    finished = server.served.scheduler.counters.finished
    assert finished["length"] >= 29
    assert finished["cancelled"] >= 1
    # Side by side: far fewer steps than tokens.
    assert server.served.scheduler.counters.steps < server.served.scheduler.counters.tokens / 2


def until(condition: Any) -> None:
    """Wait for something that a thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_chat(server: Server, folder: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    common = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 6}
    client = server.client()
    whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    text = open_model(str(folder / "tiny"), "bodies")
    wanted = generate(text, "system: be brief\nuser: hi\nassistant:", GenerateOptions(max_new_tokens=6))
    assert choice.message.content == wanted.text
    assert choice.finish_reason == ("length" if wanted.finish_reason == "length" else "stop")
    assert whole.usage.completion_tokens == len(wanted.ids)
    assert whole.usage.prompt_tokens == wanted.prompt_tokens
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob < 0  # greedy: the best one
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    stream = client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted.text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_stop_strings_seeds_and_several_prompts(server: Server, alone: dict[str, str]) -> None:
    client, (first, second) = server.client(), PROMPTS[:2]
    many = client.completions.create(**{**GREEDY, "prompt": [first, second]})
    assert [choice.text for choice in many.choices] == [alone[first], alone[second]]
    stop = alone[first][4:7]
    stopped = client.completions.create(**{**GREEDY, "prompt": first, "stop": [stop]}).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == alone[first][: alone[first].index(stop)]
    sampled = {**GREEDY, "temperature": 1.5, "prompt": first}
    texts = [client.completions.create(**sampled, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    twice = client.completions.create(**{**sampled, "prompt": [first, first]})  # without a seed
    assert twice.choices[0].text != twice.choices[1].text
    ids = client.completions.create(**{**GREEDY, "prompt": [104, 105], "logprobs": 1}).choices[0]
    assert len(ids.logprobs.tokens) == 12
    many = client.completions.create(**{**GREEDY, "prompt": [[104, 105], [104]]})
    assert many.choices[0].text == ids.text


@pytest.mark.parametrize(
    ("path", "change", "status", "message"),
    [
        ("completions", {"n": 2}, 400, "n other than 1 is not served"),
        ("completions", {"logit_bias": {"1": 5}}, 400, "logit_bias is not served"),
        ("completions", {"tempreature": 1}, 400, "tempreature is not served"),
        ("completions", {"temperature": -1}, 400, "temperature: Input should be greater"),
        ("completions", {"prompt": ""}, 400, "prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt is empty"),
        ("completions", {"prompt": [300]}, 400, "no tokens"),
        ("completions", {"prompt": [[104], []]}, 400, "prompt is empty"),
        ("completions", {"prompt": ["a"] * 17}, 400, "17 prompts"),
        ("completions", {"model": "other"}, 404, "'other' is not served; there is 'tiny'"),
        ("completions", {"stop": list("abcde")}, 400, "more than 4"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"max_tokens": 1025}, 400, "max_tokens is 1025 and this server's answers have at most 1024"),
        ("chat/completions", {}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            400,
            "tool_calls is not served",
        ),
        ("embeddings", {}, 404, "is not served; there are"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    path: str, change: dict[str, Any], status: int, message: str, server: Server
) -> None:
    body = {"model": "tiny", "prompt": "a", **change}
    if path != "completions":
        body.pop("prompt")
    found, answer = server.post(f"/v1/{path}", json.dumps(body).encode())
    assert found == status
    assert message in answer["error"]["message"]


def test_models_health_and_metrics(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.get("/health") == (200, '{"status":"ok"}')
    status, text = server.get("/metrics")
    assert status == 200
    assert "rankbook_tokens_total" in text
    assert "rankbook_requests_waiting 0.0" in text


def test_a_key_a_full_queue_and_a_long_body(folder: Path) -> None:
    served = prepare(options(folder, slots=1, queue=1, max_body=4000), key="secret")
    with Server(served) as server:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            server.client("wrong").models.list()
        assert server.post("/v1/completions", b"{}")[0] == 401
        client = server.client("secret")
        assert client.completions.create(**{**GREEDY, "prompt": "a"}).usage.completion_tokens == 12
        status, body = server.post("/v1/completions", b" " * 5000, Authorization="Bearer secret")
        assert (status, "longer than 4000 bytes" in body["error"]["message"]) == (413, True)
        held = threading.Event()
        step = served.scheduler._slots.step

        def slow(tokens: Any) -> Any:
            held.wait(30)
            return step(tokens)

        served.scheduler._slots.step = slow
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(client.completions.create, **{**GREEDY, "prompt": "a"})
            until(lambda: served.scheduler.counters.prompt_tokens >= 2)
            waiting = pool.submit(client.completions.create, **{**GREEDY, "prompt": "b"})
            until(lambda: len(served.scheduler._waiting) == 1)
            with pytest.raises(openai.RateLimitError, match="1 requests are waiting"):
                client.completions.create(**{**GREEDY, "prompt": "c"})
            held.set()
            assert running.result().usage.completion_tokens == waiting.result().usage.completion_tokens == 12


@pytest.mark.parametrize("how", [[], ["--whole"]])
def test_the_load_of_several_clients_is_measured(
    how: list[str], server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    before = server.served.scheduler.counters.tokens
    sizes = ["--clients", "1", "3", "--turns", "2", "--tokens", "5"]
    assert serve_load.main([url, *sizes, *how, "--json"]) == errors.OK
    loads = json.loads(capsys.readouterr().out)
    assert [load["clients"] for load in loads] == [1, 3]
    assert loads[0]["speed"] == 1
    assert loads[1]["speed"] == pytest.approx(loads[1]["tokens_per_second"] / loads[0]["tokens_per_second"])
    assert server.served.scheduler.counters.tokens - before == (1 + 2 * (1 + 3)) * 5
    assert serve_load.main(["http://127.0.0.1:1/v1"]) == errors.USAGE
    assert "start `rankbook serve`" in capsys.readouterr().err


def test_a_runtime_that_fails_is_said_to_everyone_and_the_server_goes_on(folder: Path) -> None:
    served = prepare(options(folder))
    step = served.scheduler._slots.step
    served.scheduler._slots.step = lambda _tokens: 1 / 0
    with Server(served) as server:
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            server.client().completions.create(**{**GREEDY, "prompt": "a"})
        served.scheduler._slots.step = step
        assert server.client().completions.create(**{**GREEDY, "prompt": "a"}).usage.completion_tokens == 12


@pytest.fixture(scope="module", params=[True, False], ids=["bodies", "native"])
def grouped(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Server, str]]:
    """A server of the graph made for ONNX Runtime, and the kernels it uses."""
    if not request.param and (reason := native_unavailable()):
        pytest.skip(reason)
    if not (folder / "grouped").exists():
        assert run_cli("export", folder / "q", "-o", folder / "grouped", "--graph", "ort", "--quiet") == 0
    given = options(folder, model=str(folder / "grouped"), name="tiny", max_context=CONTEXT, no_native=request.param)
    with Server(prepare(given)) as running:
        yield running, "bodies" if request.param else "native"


def test_rows_of_a_cache_that_is_made_longer_go_their_own_pace(grouped: tuple[Server, str], folder: Path) -> None:
    """Texts of eight lengths share steps in the graph made for ONNX Runtime; each is what it would be alone."""
    server, kernels = grouped
    model = open_model(str(folder / "grouped"), kernels)
    chosen = GenerateOptions(max_new_tokens=12, ignore_eos=True)
    wanted = [generate(model, prompt, chosen).text for prompt in PROMPTS]

    def ask(prompt: str) -> str:
        text: str = server.client().completions.create(**{**GREEDY, "prompt": prompt}).choices[0].text
        return text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS)) == wanted
    with pytest.raises(openai.BadRequestError, match="tokens and the context holds 96"):
        ask("long " * 40)


@pytest.mark.parametrize(
    ("name", "context", "message"),
    [("tiny", 95, "the cache of .* has 96"), ("tiny", 97, "holds 96"), ("grouped", 1 << 20, "give at most that")],
)
def test_a_length_that_the_file_does_not_hold_is_refused(name: str, context: int, message: str, folder: Path) -> None:
    if not (folder / name).exists():
        assert run_cli("export", folder / "q", "-o", folder / name, "--graph", "ort", "--quiet") == 0
    with pytest.raises(errors.UsageError, match=message):
        prepare(options(folder, model=str(folder / name), max_context=context))


def test_what_cannot_be_served_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.UsageError, match="--graph ort"):
        prepare(replace(options(folder), model=str(folder / "q"), no_native=False))
    assert run_cli("serve", folder / "tiny", "--host", "0.0.0.0") == errors.USAGE
    assert "give an API key" in capsys.readouterr().err


def test_a_text_without_a_next_token_fails_alone() -> None:
    """Logits that are NaN end the text that they belong to; the one beside it goes on."""

    class Rows(Slots):
        def _compute(self, begin: int, tokens: Any, past: Any) -> Any:
            scores = np.zeros((len(tokens), 259), np.float32)
            scores[:, 65] = 1
            scores[tokens[:, -1] == 66] = np.nan
            return scores

        def _wipe(self, slot: int) -> None:
            raise AssertionError("no text comes after it")

    scheduler = Scheduler(Rows(2, 16), tiny_tokenizer(), GenerationSettings(), queue=4)
    told: dict[int, list[Piece]] = {65: [], 66: []}
    for token, pieces in told.items():
        scheduler.submit(Request([token], GenerateOptions(max_new_tokens=3), pieces.append))
    until(lambda: all(pieces and pieces[-1].finish_reason for pieces in told.values()))
    scheduler.stop()
    assert [piece.token for piece in told[65]] == [65, 65, 65, None]
    assert told[65][-1].finish_reason == "length"
    assert [(piece.token, piece.finish_reason) for piece in told[66]] == [(None, "error")]
    assert "NaN or infinite" in told[66][0].message
