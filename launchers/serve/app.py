"""The HTTP application: OpenAI's endpoints, /health, /metrics and the page, in front of a backend.

It needs the package starlette (pip install trimaran[serve]).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from trimaran.launchers.chat.asking import Asker
from trimaran.launchers.serve.answers import Choice, Piece, Plan, Planner, Usage, choices_of
from trimaran.launchers.serve.errors import ApiError, json_bytes
from trimaran.launchers.serve.grounded import Ground, checked
from trimaran.launchers.serve.http.limits import BodyReader, Gate, Limits
from trimaran.launchers.serve.http.metrics import CONTENT_TYPE, Metrics
from trimaran.launchers.serve.http.security import App, Guard, Receive, Send
from trimaran.launchers.serve.http.state import State
from trimaran.launchers.serve.long_text import Passages, places_of
from trimaran.launchers.serve.openai import ChatRequest, CompletionRequest, parse_request
from trimaran.launchers.serve.page import Page, build_page
from trimaran.launchers.serve.replies import PING, Reply, error_event
from trimaran.launchers.serve.token_text import TokenText
from trimaran.launchers.serve.work import ClientGoneError, Emit, Writing, watched
from trimaran.runtime.infer.batching.messages import Backend, BackendGoneError
from trimaran.runtime.infer.modes import ANSWER, Mode
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.retrieval.citations import CitationStream

_PING_S = 10.0
_LONG_BYTES = 64 << 10  # of a request's body; a shorter one is encoded in hundredths of a second
_PASSAGES = 1 << 40  # ids of requests beside the planner's
_JSON = "application/json"
_Parsed = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class ServeOptions:
    """How a backend is served.

    Args:
        name: of the model, as requests must name it.
        guard: who may use the port.
        mode: what becomes of a user's text in a chat.
        twin: whose library chats are answered from; None for the weights alone.
    """

    name: str
    limits: Limits = field(default_factory=Limits)
    guard: Guard = field(default_factory=lambda: Guard.make("127.0.0.1"))
    mode: Mode = ANSWER
    twin: Twin | None = None
    page: Page = field(default_factory=build_page)


@dataclass(frozen=True)
class _Lane:
    """Where requests are encoded: short ones never wait for a long one.

    Args:
        thread: a single one.
        encoding: with a tokenizer that it alone uses, as encoding changes a tokenizer for a moment.
    """

    thread: ThreadPoolExecutor
    encoding: RunText
    planner: Planner


class Service:
    """What the endpoints share."""

    def __init__(self, backend: Backend, text: RunText, options: ServeOptions) -> None:
        self.backend, self.text, self.options = backend, text, options
        self.gate = Gate(backend.slots, options.limits.max_queue)
        self.metrics, self.bodies = Metrics(), BodyReader(options.limits)
        self.state = State()
        self.created = int(time.time())
        self.tokens = TokenText(text.tokenizer)
        ids = count(1)
        self._short, self._long = (self._lane(ids) for _ in range(2))
        self.asker = Asker(backend, text, first_id=_PASSAGES, thread=self._long.thread, encoding=self._long.encoding)

    def _lane(self, ids: Iterator[int]) -> "_Lane":
        encoding, options = replace(self.text, tokenizer=self.text.tokenizer.with_special_tokens(())), self.options
        planner = Planner(encoding, self.backend.context, self.gate.most, options.mode, options.twin, ids)
        return _Lane(ThreadPoolExecutor(1, "encode"), encoding, planner)

    async def plan(self, body: bytes, record: type[ChatRequest] | type[CompletionRequest]) -> tuple[_Parsed, Plan]:
        """Return a body as a request, and its plan; ApiError where it is wrong."""
        lane = self._long if len(body) > _LONG_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(lane.thread, self._plan, lane.planner, body, record)

    def _plan(
        self, planner: Planner, body: bytes, record: type[ChatRequest] | type[CompletionRequest]
    ) -> tuple[_Parsed, Plan]:
        request = parse_request(body, record)
        if request.model != self.options.name:
            raise ApiError(
                404,
                f"there is no model {request.model[:100]!r} here; this server has {self.options.name!r}",
                param="model",
                code="model_not_found",
            )
        plan = planner.chat(request) if isinstance(request, ChatRequest) else planner.completion(request)
        return request, plan

    async def warm_up(self) -> None:
        """Do what only a first request would wait for: a template is compiled, a vocabulary is read."""
        await asyncio.get_running_loop().run_in_executor(self._short.thread, self._warm_up)

    def _warm_up(self) -> None:
        self.tokens.bytes_of(0)
        body = json_bytes({"model": self.options.name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
        with suppress(ApiError):  # a template may want other messages
            self._plan(self._short.planner, body, ChatRequest)

    async def checked(self, answer: str, ground: Ground | None) -> dict[str, Any] | None:
        """Return a twin's answer as it is held to its passages; None for another's."""
        twin = self.options.twin
        if twin is None or ground is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._short.thread, checked, twin, answer, ground)

    def close(self) -> None:
        """End the threads that encode."""
        for lane in (self._short, self._long):
            lane.thread.shutdown(wait=False, cancel_futures=True)


def serve_app(backend: Backend, text: RunText, options: ServeOptions) -> Starlette:
    """Return the application; its `state.service` is the Service.

    Args:
        text: how the model reads and writes; its stop tokens must be in the model's vocabulary.
    """
    service = Service(backend, text, options)

    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != options.name:
            message = f"there is no model {name[:100]!r} here; this server has {options.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return _json(_model(service))

    async def health(request: Request) -> Response:
        status = service.state.status
        return _json({"status": status}, 200 if status == "ok" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(service.gate.taken, backend.slots), media_type=CONTENT_TYPE)

    async def page(request: Request) -> Response:
        headers = {"content-security-policy": options.page.csp}
        return Response(options.page.html, media_type="text/html", headers=headers)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=[Middleware(_Guarded, options.guard)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _failure},
    )
    app.state.service = service
    return app


class _Guarded:
    def __init__(self, app: App, guard: Guard) -> None:
        self._app = guard.around(app, _error_response)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _answer(service: Service, request: Request, record: type[ChatRequest] | type[CompletionRequest]) -> Response:
    """Return the answer to a request; ApiError where it gets none."""
    endpoint = "chat" if record is ChatRequest else "completions"
    outcomes = service.metrics.requests
    try:
        service.state.check_open()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _JSON:
            raise ApiError(415, f"the Content-Type must be {_JSON}; it is {kind[:100]!r}")
        body = await service.bodies.read(request.headers.get("content-length"), request.stream())
        start_s = time.monotonic()
        parsed, plan = await service.plan(body, record)
        service.state.check_open()
    except ClientDisconnect:
        outcomes[endpoint, "disconnected"] += 1
        return Response(status_code=400)
    except ApiError as error:
        outcomes[endpoint, "draining" if error.status == 503 else "refused"] += 1
        raise
    return _Answer(service, endpoint, parsed, plan, start_s)


class _Answer(Response):
    """An answer that is written while it is sent, or before."""

    def __init__(self, service: Service, endpoint: str, parsed: _Parsed, plan: Plan, start_s: float) -> None:
        super().__init__()
        self._service, self._endpoint, self._parsed, self._plan = service, endpoint, parsed, plan
        self._start_s, self._is_stream = start_s, bool(parsed.stream)
        self._passages: Passages | None = None
        if plan.long is not None:
            self._passages = Passages(service.asker, plan.long, places_of(service.gate))
        self._reply = Reply(
            is_chat=isinstance(parsed, ChatRequest),
            model=service.options.name,
            created=int(time.time()),
            tokens=service.tokens,
            num_choices=plan.num_choices,
            tells_logprobs=parsed.num_top is not None,
            tells_usage=parsed.includes_usage,
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        service, outcome = self._service, "failed"
        stream = _EventStream(send, self._reply.start())
        service.state.running += 1
        try:
            count = len(self._plan.requests) if self._passages is None else self._passages.at_once
            with service.gate.enter(count) as places:
                writing = Writing(service.backend, self._choices(), service.metrics, places, self._start_s)
                work = self._stream(writing, stream) if self._is_stream else self._whole(writing, scope, receive, send)
                await watched(work, receive, service.state.over, service.options.limits.request_s)
            outcome = "completed"
            service.metrics.request_s.add(time.monotonic() - self._start_s)
        except ClientGoneError:
            outcome = "disconnected"
        except BackendGoneError as error:
            service.state.has_gone(str(error))
            await self._fail(ApiError(503, f"the model's ranks have ended: {error}"), stream, scope, receive, send)
        except ApiError as error:
            outcome = {429: "full", 504: "timed_out"}.get(error.status, "failed")
            await self._fail(error, stream, scope, receive, send)
        finally:
            if self._passages is not None:
                self._passages.count(service.metrics)
            service.state.running -= 1
            service.metrics.requests[self._endpoint, outcome] += 1

    def _choices(self) -> list[Choice]:
        is_chat = isinstance(self._parsed, ChatRequest)
        return choices_of(
            self._plan, self._service.text, self._service.tokens, is_chat=is_chat, is_empty=self._parsed.limit == 0
        )

    async def _whole(self, writing: Writing, scope: Any, receive: Receive, send: Send) -> None:
        pieces: list[list[Piece]] = [[] for _ in range(self._plan.num_choices)]

        async def keep(index: int, piece: Piece) -> None:
            pieces[index].append(piece)

        await self._write(writing, keep)
        told = await self._told("".join(each.text for each in pieces[0]))
        body = self._reply.whole(pieces, self._usage(writing), told)
        await Response(body, media_type=_JSON)(scope, receive, send)

    async def _stream(self, writing: Writing, stream: "_EventStream") -> None:
        texts: list[str] = []  # where something is told beside the text, there is one choice
        cited = None if self._plan.ground is None else CitationStream(len(self._plan.ground.passages))

        async def tell(index: int, piece: Piece) -> None:
            if cited is not None:
                texts.append(piece.text)
                shown = cited.add(piece.text) + (cited.finish() if piece.finish is not None else "")
                piece = replace(piece, text=shown)
            told = None if piece.finish is None else await self._told("".join(texts))
            await stream.add(self._reply.chunk(index, piece, told))

        async with stream.pinging():
            await self._write(writing, tell)
        await stream.end(self._reply.end(self._usage(writing)))

    async def _write(self, writing: Writing, emit: Emit) -> None:
        """Have the choices written, or the passages of a long text, or say that the texts are silent."""
        if self._passages is not None:
            await self._passages.run(emit)
        elif self._plan.silence:
            await emit(0, Piece(self._plan.silence, (), "stop"))
        else:
            await writing.run(emit)

    async def _told(self, text: str) -> dict[str, Any] | None:
        """Return what an answer of this text tells beside it, in the field `trimaran`; None for nothing."""
        if self._passages is not None:
            return self._passages.record()
        return await self._service.checked(text, self._plan.ground)

    def _usage(self, writing: Writing) -> Usage:
        if self._passages is not None:
            return self._passages.usage()
        return writing.usage(self._plan.num_prompt_tokens, self._plan.num_choices // (self._parsed.n or 1))

    async def _fail(self, error: ApiError, stream: "_EventStream", scope: Any, receive: Receive, send: Send) -> None:
        """Send an error; a client that does not read it is not waited for."""
        if stream.has_begun:
            await stream.end(error_event(error))
        else:
            await _error_response(error)(scope, receive, send)


class _EventStream:
    """A stream of server-sent events (WHATWG HTML, section 9.2), which begins with its first event.

    Args:
        first: what stands before the first of them.
    """

    def __init__(self, send: Send, first: bytes) -> None:
        self._send, self._first, self._lock = send, first, asyncio.Lock()
        self.has_begun = False

    async def add(self, event: bytes) -> None:
        """Send an event."""
        async with self._lock:
            await self._begin()
            first, self._first = self._first, b""
            await self._send({"type": "http.response.body", "body": first + event, "more_body": True})

    async def end(self, event: bytes) -> None:
        """Send the last event."""
        async with self._lock:
            await self._begin()
            await self._send({"type": "http.response.body", "body": event, "more_body": False})

    @asynccontextmanager
    async def pinging(self) -> AsyncIterator[None]:
        """Send a comment from time to time in the block, so that nobody between takes the connection for dead."""
        pings = asyncio.create_task(self._ping())
        try:
            yield
        finally:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def _ping(self) -> None:
        while True:
            await asyncio.sleep(_PING_S)
            async with self._lock:
                await self._begin()
                await self._send({"type": "http.response.body", "body": PING, "more_body": True})

    async def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})


def _model(service: Service) -> dict[str, Any]:
    """Return the record of the model, with how many tokens its context has, and whom a twin imitates."""
    twin = service.options.twin
    return {
        "id": service.options.name,
        "object": "model",
        "created": service.created,
        "owned_by": "trimaran",
        "max_model_len": service.backend.context,
        "has_chat_template": service.text.template is not None,
        "twin": None if twin is None else dict(twin.about),
    }


def _json(value: Any, status: int = 200) -> Response:
    return Response(json_bytes(value), status, media_type=_JSON)


def _error_response(error: ApiError) -> Response:
    return Response(error.body(), error.status, dict(error.headers), media_type=_JSON)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer to a path or method that is not there."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:100]}"
    message = f"{what}: there is no such endpoint" if error.status_code == 404 else f"{what}: {error.detail}"
    return _error_response(ApiError(error.status_code, message, headers=error.headers or {}))


async def _failure(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, "this server has failed; its terminal says why"))
