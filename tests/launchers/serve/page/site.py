"""The page of `trimaran serve` behind a server whose answers a test has written down."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from trimaran.launchers.serve.page import build_page


class Gate:
    """A place of an answer where it waits until the test opens it."""

    def __init__(self) -> None:
        self._is_open = threading.Event()

    def open(self) -> None:
        """Let the answer go on."""
        self._is_open.set()

    async def passed(self) -> None:
        """Wait for `open`."""
        while not self._is_open.is_set():
            await asyncio.sleep(0.005)


class Cut:
    """A place of an answer where the connection is cut."""


class Site:
    """A server on a free port of 127.0.0.1.

    Attributes:
        answers: of the chat's requests, in their order; each a list of pieces (text, `Gate`, `Cut`, or a dict, which is
            sent as a chunk), or a tuple (status, error of OpenAI's form, headers). Where none is left, "All right."
        requests: the bodies of the chat's requests.
        key: that requests have to bear, or "".
        models: names.
        twin: of each model, as /v1/models tells it.
        left: how many clients have gone before the end of an answer.
    """

    def __init__(self) -> None:
        self.page = build_page()
        self.server = uvicorn.Server(
            uvicorn.Config(self.app(), port=0, log_level="critical", timeout_graceful_shutdown=1)
        )
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier test has set."""
        self.answers: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.key = ""
        self.models = ["tiny"]
        self.twin: dict[str, Any] | None = None
        self.left = 0

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/", self.root),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    @property
    def url(self) -> str:
        """Where the page is."""
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    @contextmanager
    def running(self) -> Iterator["Site"]:
        """Serve in a thread."""
        thread = threading.Thread(target=self.server.run)
        thread.start()
        try:
            while not self.server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            yield self
        finally:
            self.server.should_exit = True
            thread.join()

    def wait_left(self, count: int) -> None:
        """Wait until so many clients have gone before the end of their answer."""
        while self.left < count:
            time.sleep(0.01)

    async def root(self, request: Request) -> Response:
        """Serve the page as `trimaran serve` does."""
        headers = {"content-security-policy": self.page.csp, "x-content-type-options": "nosniff"}
        return Response(self.page.html, media_type="text/html; charset=utf-8", headers=headers)

    def refused(self, request: Request) -> Response | None:
        """Return the answer to a request without the key."""
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return failure(401, {"message": "The key is wrong", "code": "invalid_api_key"})

    async def list_models(self, request: Request) -> Response:
        """List the models."""
        data = [{"id": name, "object": "model", "twin": self.twin} for name in self.models]
        return self.refused(request) or JSONResponse({"object": "list", "data": data})

    async def chat(self, request: Request) -> Response:
        """Give the next answer."""
        refused = self.refused(request)
        if refused:
            return refused
        self.requests.append(await request.json())
        answer = self.answers.pop(0) if self.answers else ["All right."]
        if isinstance(answer, tuple):
            return failure(*answer)
        return StreamingResponse(self.events(answer), media_type="text/event-stream")

    async def events(self, answer: list[Any]) -> AsyncIterator[str]:
        """Yield the events of a streamed answer, with line ends and comments as sse-starlette writes them."""
        is_whole = False
        try:
            tokens = 0
            for piece in answer:
                if isinstance(piece, Gate):
                    yield ": waiting\r\n\r\n"
                    await piece.passed()
                elif isinstance(piece, Cut):
                    raise ConnectionAbortedError
                elif isinstance(piece, dict):
                    yield event(piece)
                else:
                    tokens += 1
                    yield event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
            yield event({"choices": [], "usage": usage})
            yield "data: [DONE]\r\n\r\n"
            is_whole = True
        finally:
            self.left += not is_whole


def event(chunk: dict[str, Any]) -> str:
    """Return a chunk as a server-sent event."""
    return f"data: {json.dumps(chunk)}\r\n\r\n"


def failure(status: int, error: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """Return an error in OpenAI's form."""
    return JSONResponse({"error": error}, status, headers)
