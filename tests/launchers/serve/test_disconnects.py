"""Clients that go away: their places are free at once, and a thousand of them leave no task, slot or memory behind."""

import asyncio
import gc
import json
import random
from typing import Any

import httpx
import pytest

from tests.launchers.serve.fake_backend import FakeBackend, writes
from tests.launchers.serve.serving import NAME, Served, connect, served, with_limits
from tests.launchers.serve.test_bad_requests import CHAT, post_and_leave_open, read_all
from trimaran.launchers.serve.app import Service, serve_app
from trimaran.launchers.serve.http.server import Running, listen
from trimaran.runtime.infer.prompts import RunText

REQUESTS, AT_ONCE = 1000, 25


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_is_gone_frees_its_places(text: RunText, sentence: list[int], stream: bool, choices: int) -> None:
    with served(text, lambda: FakeBackend(writes(sentence), step_s=0.01, context=100_000)) as server:
        server.backend.rule = writes(sentence[:4])
        connection = post_and_leave_open(server, CHAT | {"stream": stream, "n": choices})
        server.wait_until(lambda: server.service.metrics.new_tokens > 5 * choices)
        assert server.backend.active == server.service.gate.taken == choices
        written = server.service.metrics.new_tokens
        connection.close()
        server.wait_until(lambda: server.backend.active == server.service.gate.taken == 0)
        assert server.backend.left == choices
        assert server.service.metrics.new_tokens - written < 1000, "of 100,000"
        assert server.service.metrics.requests["chat", "disconnected"] == 1
        assert server.service.metrics.active == server.service.state.running == 0


def test_one_that_waits_frees_its_place_in_the_queue(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence), slots=1), with_limits(max_queue=1)) as server:
        server.call(server.backend.hold.clear)
        first = post_and_leave_open(server, CHAT)
        server.wait_until(lambda: server.backend.active == 1)
        with post_and_leave_open(server, CHAT):
            server.wait_until(lambda: server.backend.waiting == 1)
        server.wait_until(lambda: server.backend.waiting == 0)
        assert server.service.gate.taken == 1
        server.call(server.backend.hold.set)
        assert b"200 OK" in first.recv(1 << 16)
        first.close()


def test_a_client_that_leaves_in_mid_body(server: Served) -> None:
    before = server.service.metrics.requests["chat", "disconnected"]
    connection = post_and_leave_open(server, CHAT)
    connection.close()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with post_and_leave_open(server, CHAT) as connection:
        connection.recv(1 << 16)
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
    server.wait_until(lambda: server.service.metrics.requests["chat", "disconnected"] > before)
    server.wait_until(lambda: server.service.gate.taken == server.service.bodies._held == 0)


def test_a_thousand_requests_with_random_disconnects_leave_nothing_behind(text: RunText, sentence: list[int]) -> None:
    outcome = asyncio.run(thousand_requests(text, sentence))
    assert outcome["active"] == outcome["waiting"] == outcome["taken"] == outcome["running"] == outcome["metrics"] == 0
    assert outcome["tasks"] == 0
    assert outcome["connections"] == 0
    assert outcome["most_active"] == 8, "the slots were full"
    assert 100 < outcome["disconnected"] < 900
    assert outcome["completed"] > 100
    assert outcome["objects"] < REQUESTS / 5, "not one object of a request, and hardly one of the server, is kept"


async def thousand_requests(text: RunText, sentence: list[int]) -> dict[str, int]:
    """Send the requests, many at a time, and return what is left and what became of them."""
    backend = FakeBackend(writes(sentence), slots=8, context=200)
    options = with_limits(max_queue=40)
    app = serve_app(backend, text, options)
    service: Service = app.state.service
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        running, ready = Running(app, service.state, listener, options.limits), asyncio.Event()
        server = asyncio.create_task(running.serve(ready.set, lambda count: None))
        await ready.wait()
        draw = random.Random(7)

        async def one_after_another(count: int) -> None:
            for _ in range(count):
                await one_client(port, draw)

        async def some(count: int) -> None:
            async with asyncio.TaskGroup() as clients:
                for _ in range(AT_ONCE):
                    clients.create_task(one_after_another(count // AT_ONCE))
            while service.gate.taken or running._server.server_state.connections:
                await asyncio.sleep(0.01)

        await some(200)  # caches are warm after these
        before = asyncio.all_tasks()
        start = count_objects(backend)
        await some(REQUESTS)
        left = asyncio.all_tasks() - before  # a connection is gone a moment before the task that served it
        if left:
            await asyncio.wait(left, timeout=60)
        outcome = {
            "tasks": len(asyncio.all_tasks() - before),
            "connections": len(running._server.server_state.connections),
            "objects": count_objects(backend) - start,
        }
        running.stop()
        await server
        service.close()
    return outcome | {
        "active": backend.active, "waiting": backend.waiting, "most_active": backend.most_active,
        "taken": service.gate.taken, "running": service.state.running, "metrics": service.metrics.active,
        "disconnected": service.metrics.requests["chat", "disconnected"],
        "completed": service.metrics.requests["chat", "completed"],
    }  # fmt: skip


def count_objects(backend: FakeBackend) -> int:
    """How many objects there are that may hold others; the backend forgets what it has seen for its tests."""
    backend.seen.clear()
    gc.collect()
    return len(gc.get_objects())


async def one_client(port: int, draw: random.Random) -> None:
    """Ask for an answer, and leave before, in or after it."""
    request: dict[str, Any] = {
        "model": NAME, "messages": [{"role": "user", "content": "hi"}],
        "stream": draw.random() < 0.7, "n": draw.choice((1, 1, 1, 3)),
    }  # fmt: skip
    content = json.dumps(request).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    whole = f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    kind = draw.random()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(whole if kind > 0.1 else whole[: draw.randrange(len(whole))])
    if kind > 0.5:
        await reader.read()
    elif kind > 0.1:
        for _ in range(draw.randrange(6)):
            await reader.read(draw.choice((1, 200)))
    if draw.random() < 0.3:
        writer.transport.abort()
    writer.close()


def test_what_runs_when_the_time_to_finish_is_over_is_told(text: RunText, sentence: list[int]) -> None:
    make = lambda: FakeBackend(writes(sentence[:4]), step_s=0.01, context=100_000)
    with served(text, make, with_limits(drain_s=0.2)) as server:
        stream = post_and_leave_open(server, CHAT | {"stream": True})
        whole = post_and_leave_open(server, CHAT)
        idle = connect(server.port)
        server.wait_until(lambda: server.service.metrics.new_tokens > 10)
        server.call(server.running.stop)
        server.wait_until(lambda: server.service.state.is_draining)
        for connection, start in ((stream, b"HTTP/1.1 200"), (whole, b"HTTP/1.1 503"), (idle, b"")):
            answer = read_all(connection)
            assert answer.startswith(start)
            assert (b"stopped before the answer was complete" in answer) == (connection is not idle)
            assert b"[DONE]" not in answer
            connection.close()
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.code == [0]
        assert server.backend.active == server.service.gate.taken == 0


def test_a_server_that_drains_takes_no_request(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence))) as server:
        server.call(server.backend.hold.clear)
        held = post_and_leave_open(server, CHAT)
        server.wait_until(lambda: server.backend.active == 1)
        server.call(server.running.stop)
        server.wait_until(lambda: server.service.state.is_draining)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "10"
        assert refused.headers["connection"] == "close"
        assert refused.json()["error"]["message"] == "this server is about to stop"
        server.call(server.backend.hold.set)
        assert b"200 OK" in held.recv(1 << 16)
        held.close()
        server.thread.join(60)
        assert server.code == [0]
        assert server.service.metrics.requests["chat", "draining"] == 1


def test_a_second_call_to_stop_ends_at_once(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence)), with_limits(drain_s=1000)) as server:
        server.call(server.backend.hold.clear)
        with post_and_leave_open(server, CHAT) as held:
            server.wait_until(lambda: server.backend.active == 1)
            server.call(server.running.stop)
            server.call(server.running.stop)
            assert b"503 Service Unavailable" in held.recv(1 << 16)
        server.thread.join(60)
        assert server.code == [15]
        assert server.backend.active == 0
