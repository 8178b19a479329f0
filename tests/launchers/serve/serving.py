"""A server in this process, for clients as users have them: in a thread with an event loop of its own."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from tests.launchers.runs import text_of
from tests.launchers.serve.fake_backend import FakeBackend
from trimaran.launchers.serve.app import ServeOptions, Service, serve_app
from trimaran.launchers.serve.http.server import Running, listen
from trimaran.runtime.data.tokens.tokenizer import Tokenizer
from trimaran.runtime.infer.prompts import RunText

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ' ' + message.content + '<|im_end|>' }}"
    "{% endfor %}{{ '<|im_start|>' if add_generation_prompt }}"
)
NAME = "tiny"


def make_text(folder: Path, template: str | None = TEMPLATE) -> RunText:
    """A byte-level tokenizer of 300 tokens and the special ones of conversations, in a folder."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train([text_of(300)], 300).definition)
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return RunText.open(folder)


@dataclass
class Served:
    """A server that runs in a thread.

    Args:
        call: runs a function in the server's loop and returns its result.
    """

    port: int
    backend: FakeBackend
    service: Service
    running: Running
    call: Callable[[Callable[[], Any]], Any]
    code: list[int]
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, happened: Callable[[], bool], patience_s: float = 60.0) -> None:
        """Wait for something that the server does."""
        deadline = threading.Event()
        for _ in range(int(patience_s / 0.01)):
            if happened():
                return
            deadline.wait(0.01)
        raise AssertionError(f"still waiting after {patience_s} s")


@contextlib.contextmanager
def served(
    text: RunText, make_backend: Callable[[], FakeBackend], options: ServeOptions | None = None
) -> Iterator[Served]:
    """Serve a backend, which is made in the server's loop, until the end of the block."""
    options = options or ServeOptions(NAME)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    started, found, code = threading.Event(), [], []

    async def run() -> None:
        loop, backend = asyncio.get_running_loop(), make_backend()
        app = serve_app(backend, text, options)
        running = Running(app, app.state.service.state, listener, options.limits)
        found.append((loop, backend, app.state.service, running))
        code.append(await running.serve(started.set, lambda count: None))
        app.state.service.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(60)
    loop, backend, service, running = found[0]

    def call(function: Callable[[], Any]) -> Any:
        async def inner() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(inner(), loop).result(60)

    try:
        yield Served(port, backend, service, running, call, code, thread)
    finally:
        if thread.is_alive():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(running.stop)
        thread.join(60)
        assert not thread.is_alive()


def with_limits(**changes: Any) -> ServeOptions:
    """The options with other limits."""
    options = ServeOptions(NAME)
    return replace(options, limits=replace(options.limits, **changes))


def connect(port: int) -> socket.socket:
    """A plain connection, for clients that speak HTTP badly."""
    return socket.create_connection(("127.0.0.1", port), timeout=60)
