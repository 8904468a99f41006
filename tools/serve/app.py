"""The HTTP side of the server: routes, limits, the API key, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from rankbook.tools.errors import UsageError
from rankbook.tools.generation.loop import prompt_ids
from rankbook.tools.serve import metrics, scheduler
from rankbook.tools.serve.protocol import Chat, Completion, RefusedError, Writer, event, parse
from rankbook.tools.serve.scheduler import BusyError, Piece, Scheduler

_LOOK = 0.2
"""Seconds between two looks whether a client that waits is still there."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body_bytes: Largest body.
        max_new_tokens: Most new tokens of a text; a request that asks for none gets so many.
        prompts: Most prompts in one request.
    """

    body_bytes: int
    max_new_tokens: int
    prompts: int = 16


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: As requests call it.
        tokenizer: Its tokenizer.
        scheduler: What decodes.
        limits: For requests.
        api_key: What requests must show; empty for none.
    """

    name: str
    tokenizer: Any
    scheduler: Scheduler
    limits: Limits
    api_key: str = ""


def create_app(served: Served) -> FastAPI:
    """Return the application."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.scheduler.stop)

    app = FastAPI(title="Rankbook", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    told = metrics.Metrics(served.scheduler)

    @app.exception_handler(RefusedError)
    async def refused(_request: Request, error: RefusedError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Any) -> Response:
        known = "/v1/completions, /v1/chat/completions, /v1/models, /health, /metrics"
        message = f"{request.method} {request.url.path} is not served; there are {known}"
        return JSONResponse(RefusedError(message, error.status_code).body(), error.status_code)

    @app.get("/health")
    async def health() -> Response:
        healthy = served.scheduler.healthy
        return JSONResponse({"status": "ok" if healthy else "down"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def measured(request: Request) -> Response:
        _check_key(served, request)
        return Response(told.text(), media_type=metrics.MEDIA_TYPE)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _check_key(served, request)
        return {
            "object": "list",
            "data": [{"id": served.name, "object": "model", "created": 0, "owned_by": "rankbook"}],
        }

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked: Completion = parse(Completion, await _body(served, request))
        if not (given := asked.prompt):
            raise RefusedError("prompt is empty", param="prompt")
        prompts: list[Any] = (
            [given] if isinstance(given, str) or (isinstance(given[:1], list) and _is_ids(given)) else [*given]
        )
        return await _answer(served, request, asked, [_ids(served, prompt) for prompt in prompts], asked.max_tokens)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked: Chat = parse(Chat, await _body(served, request))
        most = asked.max_completion_tokens or asked.max_tokens
        return await _answer(served, request, asked, [_chat_ids(served, asked)], most)

    return app


def _is_ids(given: Any) -> bool:
    return bool(given) and all(isinstance(item, int) for item in given)


def _ids(served: Served, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        size = len(served.tokenizer)
        if any(not 0 <= token < size for token in prompt):
            raise RefusedError(f"prompt holds numbers that are no tokens; there are {size}", param="prompt")
        return prompt
    try:
        return prompt_ids(served.tokenizer, prompt)
    except UsageError:
        raise RefusedError("prompt is empty", param="prompt") from None


def _chat_ids(served: Served, asked: Chat) -> list[int]:
    if getattr(served.tokenizer, "chat_template", None) is None:
        raise RefusedError(f"{served.name} has no chat template; use /v1/completions", param="messages")
    turns = [message.turn for message in asked.messages]
    try:
        text = served.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise RefusedError(f"the chat template refuses the messages: {error}", param="messages") from None
    return list(served.tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_key(served: Served, request: Request) -> None:
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    if served.api_key and not hmac.compare_digest(shown.encode(), served.api_key.encode()):
        raise RefusedError("the API key is missing or wrong", 401, "authentication_error")


async def _body(served: Served, request: Request) -> bytes:
    """Return the body of a request that may ask, as long as it is not too long."""
    _check_key(served, request)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > served.limits.body_bytes:
            raise RefusedError(f"the body is longer than {served.limits.body_bytes} bytes", 413)
        parts.append(part)
    return b"".join(parts)


class _Texts:
    """The texts of one request, as their pieces come from the scheduler's thread."""

    def __init__(self, served: Served, asked: Any, prompts: list[list[int]], most: int | None) -> None:
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop, limits = asyncio.get_running_loop(), served.limits

        def deliver(index: int) -> Callable[[Piece], None]:
            def put(piece: Piece) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return put

        most = min(most or limits.max_new_tokens, limits.max_new_tokens)
        self._requests = [
            scheduler.Request(ids, asked.generate_options(most), deliver(index), asked.stops, asked.top)
            for index, ids in enumerate(prompts)
        ]
        self._open = len(prompts)
        try:
            for request in self._requests:
                served.scheduler.submit(request)
        except UsageError as error:
            self.cancel()
            raise RefusedError(str(error), param="prompt") from None
        except BusyError as error:
            self.cancel()
            raise RefusedError(str(error), 429, "rate_limit_error") from None

    def cancel(self) -> None:
        """Tell the scheduler that nobody wants them any more."""
        for request in self._requests:
            request.cancelled.set()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield every piece with the number of its text.

        Raises:
            RefusedError: The server failed, or goes down.
        """
        while self._open:
            index, piece = await self._queue.get()
            if piece.finish_reason in ("error", "cancelled"):
                raise RefusedError(piece.message or "the request was cancelled", 503, "server_error")
            self._open -= piece.finish_reason is not None
            yield index, piece


async def _answer(served: Served, request: Request, asked: Any, prompts: list[list[int]], most: int | None) -> Response:
    if asked.model != served.name:
        raise RefusedError(f"the model {asked.model!r} is not served; there is {served.name!r}", 404, param="model")
    if len(prompts) > served.limits.prompts:
        raise RefusedError(
            f"{len(prompts)} prompts in one request; {served.limits.prompts} are allowed", param="prompt"
        )
    limit = served.limits.max_new_tokens
    field = "max_completion_tokens" if getattr(asked, "max_completion_tokens", None) else "max_tokens"
    if field in asked.model_fields_set and (most or 0) > limit:
        raise RefusedError(
            f"{field} is {most} and this server's answers have at most {limit} tokens; ask for no more, or start it"
            " with a larger --max-new-tokens",
            param=field,
        )
    texts, writer = _Texts(served, asked, prompts, most), Writer(asked, served.tokenizer)
    writer.count(prompt=sum(map(len, prompts)))
    if asked.stream:
        return StreamingResponse(_stream(texts, writer), media_type="text/event-stream")
    watch = asyncio.create_task(_cancel_when_gone(request, texts))
    try:
        return JSONResponse(await _collect(texts, writer, len(prompts)))
    finally:
        watch.cancel()
        texts.cancel()


async def _collect(texts: _Texts, writer: Writer, count: int) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    async for index, piece in texts.pieces():
        pieces[index].append(piece)
        writer.count(completion=piece.token is not None)
    whole = ["".join(piece.text for piece in told) for told in pieces]
    return writer.whole(whole, [told[-1].finish_reason or "" for told in pieces], pieces)


async def _stream(texts: _Texts, writer: Writer) -> AsyncIterator[str]:
    try:
        for chunk in writer.opening():
            yield event(chunk)
        async for index, piece in texts.pieces():
            writer.count(completion=piece.token is not None)
            yield event(writer.piece(index, piece))
        for chunk in writer.closing():
            yield event(chunk)
        yield event("[DONE]")
    except RefusedError as error:  # the status is sent already
        yield event(error.body())
    finally:  # also where the client has gone
        texts.cancel()


async def _cancel_when_gone(request: Request, texts: _Texts) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK)
    texts.cancel()
