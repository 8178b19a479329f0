"""What is refused by the server, and the sentence and code that it gets: fields, bodies, limits, full queues."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.launchers.serve.fake_backend import FakeBackend, writes
from tests.launchers.serve.serving import NAME, Served, connect, served, with_limits
from trimaran.runtime.infer.prompts import RunText

USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": NAME, "messages": [USER]}
COMPLETION: dict[str, Any] = {"model": NAME, "prompt": "ab"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has all fields of OpenAI's form."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if response.status_code >= 500 else error["type"])
    return dict(error)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"model": None}, "model", "model (None) should be a valid string"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "should be a valid list"),
        ({"messages": [USER] * 100_000}, "messages", "at most 2,048 messages, and this one has 100,000"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 3000}]}, "messages",
         "messages[0].content has 3,000 parts; it may have at most 2,048"),
        ({"messages": ["hi"]}, "messages", "messages[0] must be an object with role and content; it is 'hi'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of system, developer, user"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0].content must be a text"),
        ({"messages": [USER, {"role": "user", "content": [PICTURE]}]}, "messages",
         "messages[1].content[0] has the type 'image_url', which is not supported: this model reads text only"),
        ({"messages": [{**USER, "tool_calls": [FUNCTION]}]}, "messages", "has 'tool_calls', which is not supported"),
        ({"messages": [{**USER, "name": 3}]}, "messages", "messages[0].name must be a text"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages",
         "messages[0].content has half of a surrogate pair (\\ud83d) at character 2"),
        ({"tools": [FUNCTION]}, "tools", "tools is not supported by this server; leave it out"),
        ({"tool_choice": "auto"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'; is temperature meant?"),
        ({"zz\ud800": 1}, "zz?", "unknown field 'zz?'"),
        ({"prompt": "x"}, "prompt", "unknown field 'prompt'"),
        ({"temperature": 2.5}, "temperature", "temperature (2.5) should be less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "temperature ('1') should be a valid number"),
        ({"temperature": True}, "temperature", "should be a valid number"),
        ({"top_p": 0}, "top_p", "top_p (0) should be greater than 0"),
        ({"top_k": 1.5}, "top_k", "should be a valid integer"),
        ({"min_p": -0.1}, "min_p", "greater than or equal to 0"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 69}, "n", "n times the prompts is 69 texts, more than the 68 that this server holds"),
        ({"n": 10**30}, "n", "more than the 68 that this server holds"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens (0) must be at least 1"),
        ({"max_tokens": -5}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "not both"),
        ({"max_tokens": 10**9}, "messages", "this request needs 1,000,000,009 (9 in the messages"),
        ({"stop": ""}, "stop", "a text of stop must have 1 to 1,000 characters; it has 0"),
        ({"stop": ["a", 5]}, "stop", "stop must be a text or a list of texts"),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 texts; it may have at most 16"),
        ({"stop": "x" * 1001}, "stop", "it has 1001"),
        ({"stop": {}}, "stop", "stop must be a text or a list of texts"),
        ({"logprobs": 5}, "logprobs", "should be a valid boolean"),
        ({"top_logprobs": 5}, "top_logprobs", "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream": "yes"}, "stream", "should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream to true"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "not permitted"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_is_named(http: httpx.Client, change: dict[str, Any], param: str, says: str) -> None:
    response = http.post("/v1/chat/completions", content=json.dumps(CHAT | change), headers=JSON)
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert error["param"] == param
    assert says in error["message"]


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": []}, "prompt must be a text, token ids, or a list of them"),
        ({"prompt": None}, "prompt must be a text"),
        ({"prompt": [[]]}, "prompt[0] must be a text or a list of token ids"),
        ({"prompt": ["a", 3]}, "prompt[1] must be a text or a list of token ids"),
        ({"prompt": [True]}, "prompt[0] must be a text or a list of token ids; it is True"),
        ({"prompt": [1, -1]}, "prompt has the token -1, and the model's tokens are 0 to 301"),
        ({"prompt": [[5], [302]]}, "prompt[1] has the token 302"),
        ({"prompt": [10**40]}, "prompt has the token a number of more than 20 digits"),
        ({"prompt": "\udc00"}, "prompt has half of a surrogate pair"),
        ({"prompt": ["a"] * 69}, "n times the prompts is 69 texts"),
        ({"prompt": "ab" * 500}, "this model's context has 200 tokens, and this request needs 502 (501 in the prompt)"),
        ({"best_of": 3}, "best_of (3) is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"logprobs": 21}, "logprobs (21) should be less than or equal to 20"),
        ({"logprobs": True}, "logprobs (True) should be a valid integer"),
        ({"messages": []}, "unknown field 'messages'"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(http: httpx.Client, change: dict[str, Any], says: str) -> None:
    response = http.post("/v1/completions", content=json.dumps(COMPLETION | change), headers=JSON)
    assert response.status_code == 400, response.text
    assert says in error_of(response)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", None), ("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("n", None),
        ("logit_bias", {}), ("store", False), ("metadata", None), ("user", "x"), ("top_k", -1), ("stop", None),
        ("stream_options", None), ("max_tokens", None), ("temperature", 0), ("service_tier", "auto"),
    ],
)  # fmt: skip
def test_a_field_that_asks_for_nothing_is_passed_over(http: httpx.Client, field: str, value: Any) -> None:
    response = http.post("/v1/chat/completions", json=CHAT | {field: value})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b"\xff\xfe\x00", "the body is not JSON"),
        (b'{"model": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"[]", "the body must be a JSON object; it is []"),
        (b"3" * 5000, "the body is not JSON"),
        (b'{"messages": []}', "model is missing"),
    ],
)
def test_a_body_that_is_no_request(http: httpx.Client, body: bytes, says: str) -> None:
    response = http.post("/v1/chat/completions", content=body, headers=JSON)
    assert response.status_code == 400
    assert says in error_of(response)["message"]


def test_wrong_paths_methods_and_types(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert "GET /v1/nothing: there is no such endpoint" in error_of(http.get("/v1/nothing"))["message"]
    assert http.get("/v1/completions").status_code == 405
    assert error_of(http.get("/v1/completions"))["message"] == "GET /v1/completions: Method Not Allowed"
    typed = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert (typed.status_code, error_of(typed)["message"]) == (
        415,
        "the Content-Type must be application/json; it is 'text/plain'",
    )
    assert http.get("/health").json() == {"status": "ok"}


def test_ten_megabytes_are_refused_before_they_are_read(http: httpx.Client, server: Served) -> None:
    seen = len(server.backend.seen)
    response = http.post("/v1/completions", json=COMPLETION | {"prompt": "x" * 10_000_000})
    assert response.status_code == 413
    assert "more than the 4,194,304 bytes that a request may have (--max-body-bytes)" in error_of(response)["message"]
    chunks = (b"x" * 65536 for _ in range(160))
    response = http.post("/v1/completions", content=chunks, headers=JSON)  # without a Content-Length
    assert response.status_code == 413
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200, "the connection is whole"
    assert len(server.backend.seen) == seen + 1


def test_a_long_body_below_the_limit_is_read(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=COMPLETION | {"prompt": "x" * 2_000_000})
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"


def test_a_long_text_holds_up_no_short_one(text: RunText, sentence: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long one is encoded in a thread of its own: here until the short one has its answer."""
    with served(text, lambda: FakeBackend(writes(sentence))) as server:
        answered, planner = threading.Event(), server.service._long.planner
        encode = planner.completion
        monkeypatch.setattr(planner, "completion", lambda request: answered.wait(60) and encode(request))
        with post_and_leave_open(server, COMPLETION | {"prompt": "x" * 100_000}, "/v1/completions") as long:
            assert httpx.post(f"{server.url}/v1/completions", json=COMPLETION).status_code == 200
            answered.set()
            assert b"HTTP/1.1 400" in long.recv(1 << 16)


def test_a_slow_head_and_a_slow_body_end(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence)), with_limits(header_s=0.3, body_s=0.3)) as server:
        for beginning in (b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"):
            with connect(server.port) as slow:
                slow.sendall(beginning)
                assert slow.recv(100) == b"", "the connection is closed without an answer"
        with connect(server.port) as slow:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
            answer = slow.recv(1 << 16)
            slow.sendall(b" ")
            answer += read_all(slow)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"did not arrive within 0.3 s" in answer
        server.wait_until(lambda: not server.running._server.server_state.connections)


def read_all(connection: Any) -> bytes:
    """All bytes until the other side closes the connection."""
    found = b""
    while part := connection.recv(1 << 16):
        found += part
    return found


def test_a_huge_head_is_refused_whether_it_is_whole_or_not(server: Served) -> None:
    start, end = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"\r\n\r\n"
    fits = server.service.options.limits.head_bytes - len(start) - len(end)
    for size, last, status in ((50_000, b"", 400), (100_000, end, 400), (fits + 1, end, 400), (fits, end, 200)):
        sent = start + b"x" * size + last
        with connect(server.port) as hostile:
            hostile.sendall(sent)
            assert hostile.recv(12) == b"HTTP/1.1 %d" % status, len(sent)
    with connect(server.port) as hostile:
        hostile.sendall(b"no http at all\r\n\r\n")
        assert hostile.recv(12) == b"HTTP/1.1 400"


def test_too_many_connections(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence)), with_limits(connections=3)) as server:
        held = [connect(server.port) for _ in range(3)]
        server.wait_until(lambda: len(server.running._server.server_state.connections) == 3)
        with connect(server.port) as one_more:
            assert one_more.recv(100) == b""
        for each in held:
            each.close()
        server.wait_until(lambda: not server.running._server.server_state.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_full_queue_says_when_to_come_again(text: RunText, sentence: list[int]) -> None:
    make = lambda: FakeBackend(writes(sentence), slots=1)
    with served(text, make, with_limits(max_queue=2)) as server, httpx.Client(base_url=server.url) as http:
        server.call(server.backend.hold.clear)
        held = [post_and_leave_open(server, CHAT) for _ in range(2)]
        server.wait_until(lambda: server.service.gate.taken == 2)
        full = http.post("/v1/chat/completions", json=CHAT | {"n": 2})
        assert full.status_code == 429
        assert 1 <= int(full.headers["retry-after"]) <= 60
        error = error_of(full)
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "the queue is full: 2 texts are written or wait, of at most 3" in error["message"]
        metrics = http.get("/metrics").text
        assert "trimaran_texts_active 1" in metrics
        assert "trimaran_texts_waiting 1" in metrics
        assert 'trimaran_requests_total{endpoint="chat",outcome="full"} 1' in metrics
        server.call(server.backend.hold.set)
        for each in held:
            assert b"200 OK" in each.recv(1 << 16)
            each.close()
        server.wait_until(lambda: server.service.gate.taken == 0)
        assert http.post("/v1/chat/completions", json=CHAT | {"n": 2}).status_code == 200


def post_and_leave_open(server: Served, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    """Send a request, and return the connection."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = connect(server.port)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends(text: RunText, sentence: list[int], stream: bool) -> None:
    make = lambda: FakeBackend(writes(sentence), step_s=0.02)
    with served(text, make, with_limits(request_s=0.2)) as server:
        response = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"stream": stream})
        assert "not complete within 0.2 s (--timeout)" in response.text
        assert response.status_code == (200 if stream else 504)
        assert "[DONE]" not in response.text
        server.wait_until(lambda: server.backend.active == server.service.gate.taken == 0)
        assert 'outcome="timed_out"} 1' in httpx.get(f"{server.url}/metrics").text


def test_a_client_that_reads_nothing_is_not_waited_for(text: RunText, sentence: list[int]) -> None:
    make = lambda: FakeBackend(writes(sentence[:4]), context=200_000)
    with served(text, make, with_limits(stall_s=0.3)) as server:
        with post_and_leave_open(server, CHAT | {"stream": True}):
            server.wait_until(lambda: server.backend.active == 1)
            server.wait_until(lambda: server.backend.active == 0)
        assert server.service.metrics.requests["chat", "disconnected"] == 1
        assert server.service.metrics.new_tokens < 199_000


def test_a_second_request_before_the_answer_ends_the_connection(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence))) as server:
        server.call(server.backend.hold.clear)
        with post_and_leave_open(server, CHAT) as connection:
            server.wait_until(lambda: server.backend.active == 1)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            server.wait_until(lambda: server.backend.active == 0)


def test_what_is_written_is_sent_at_once(server: Served) -> None:
    """Without TCP_NODELAY every token would wait for the acknowledgement of the one before, 40 ms."""
    with connect(server.port):
        server.wait_until(lambda: bool(server.running._server.server_state.connections))
        for each in list(server.running._server.server_state.connections):
            accepted = each.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_connection_is_kept_for_the_next_request(server: Served) -> None:
    with connect(server.port) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b'{"status":"ok"}' not in answer:
                part = connection.recv(1 << 16)
                assert part, "it was closed"
                answer += part
