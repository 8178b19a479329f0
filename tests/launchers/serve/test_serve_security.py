"""Who may use the port of a server: pages of other sites, rebound names and callers without a key get nothing."""

import io
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from tests.launchers.serve.fake_backend import FakeBackend, writes
from tests.launchers.serve.serving import NAME, Served, connect, served
from trimaran.launchers.serve.app import ServeOptions
from trimaran.launchers.serve.errors import ApiError
from trimaran.launchers.serve.http.security import Guard, is_loopback, read_keys
from trimaran.launchers.serve.page import build_page
from trimaran.runtime.infer.prompts import RunText

KEYS = ("sk-first-of-the-keys", "sk-second-of-the-keys")
COMPLETION = {"model": NAME, "prompt": "ab", "max_tokens": 2}


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as http:
        yield http


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil", "", "a b"]
)
def test_a_rebound_name_gets_nothing(http: httpx.Client, server: Served, host: str) -> None:
    seen = len(server.backend.seen)
    for path in ("/", "/health", "/metrics", "/v1/models"):
        response = http.get(path, headers={"host": host})
        assert response.status_code == 403
        assert "Host of this request is not this server's" in response.json()["error"]["message"]
    assert http.post("/v1/completions", json=COMPLETION, headers={"host": host}).status_code == 403
    assert len(server.backend.seen) == seen


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:8000", "localhost."])
def test_the_names_of_this_machine_are_answered(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/models", headers={"host": host}).status_code == 200


def test_two_hosts_are_none(server: Served) -> None:
    with connect(server.port) as hostile:
        hostile.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert hostile.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "file://"},
        {"origin": "http://localhost:3000"},
        {"origin": "http://localhost:1@evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
    ],
)
def test_a_page_of_another_site_gets_nothing(http: httpx.Client, server: Served, headers: dict[str, str]) -> None:
    seen = len(server.backend.seen)
    for response in (
        http.post("/v1/completions", json=COMPLETION, headers=headers),
        http.get("/v1/models", headers=headers),
        http.options("/v1/completions", headers=headers | {"access-control-request-method": "POST"}),
    ):
        assert response.status_code == 403
        assert "a page of another site" in response.json()["error"]["message"]
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert len(server.backend.seen) == seen


def test_the_servers_own_page_and_a_link_to_it_are_answered(http: httpx.Client, server: Served) -> None:
    own = {"origin": server.url, "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}
    assert http.post("/v1/completions", json=COMPLETION, headers=own).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    page = http.get("/", headers=link)
    assert page.status_code == 200
    assert page.headers["content-security-policy"] == build_page().csp
    assert page.headers["content-type"].startswith("text/html")


def test_headers_of_every_answer(http: httpx.Client) -> None:
    for response in (http.get("/"), http.get("/v1/models"), http.get("/none"), http.post("/v1/completions", json={})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert response.headers["cache-control"] == "no-store"
        assert "server" not in response.headers
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_what_a_form_can_send_is_no_request(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert http.post("/v1/completions", content=b"{}", headers=headers).status_code == 415


def test_keys(text: RunText, sentence: list[int]) -> None:
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger().addHandler(handler)
    options = replace(ServeOptions(NAME), guard=Guard.make("127.0.0.1", keys=KEYS))
    try:
        with redirect_stderr(told), served(text, lambda: FakeBackend(writes(sentence)), options) as server:
            for key in KEYS:
                with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                    assert client.completions.create(**COMPLETION).choices[0].text == "he"
            wrong = ("sk-", KEYS[0][:-1], KEYS[0] + "x", "wörng", KEYS[0].upper())
            for key in wrong:
                headers = {"authorization": f"Bearer {key}".encode()}
                refused = httpx.post(f"{server.url}/v1/completions", json=COMPLETION, headers=headers)
                assert refused.status_code == 401
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert refused.headers["www-authenticate"] == "Bearer"
                assert key not in refused.text
            for path in ("/v1/models", "/metrics"):
                assert httpx.get(f"{server.url}{path}").status_code == 401
                basic = {"authorization": f"Basic {KEYS[0]}"}
                assert httpx.get(f"{server.url}{path}", headers=basic).status_code == 401
                twice = [("authorization", "Bearer x"), ("authorization", f"Bearer {KEYS[0]}")]
                assert httpx.get(f"{server.url}{path}", headers=twice).status_code == 401
            assert httpx.get(f"{server.url}/health").status_code == httpx.get(server.url).status_code == 200
            assert len(server.backend.seen) == 2
    finally:
        logging.getLogger().removeHandler(handler)
    assert not any(key in told.getvalue() for key in KEYS)


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a refusal tells nothing of which key was nearly right."""
    compared = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return given == key

    monkeypatch.setattr("trimaran.launchers.serve.http.security.hmac.compare_digest", compare)
    guard = Guard.make("127.0.0.1", keys=KEYS)
    for key in (*KEYS, "wrong"):
        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer " + key.encode())]
        if key == "wrong":
            with pytest.raises(ApiError):
                guard.check("GET", "/metrics", headers)
        else:
            guard.check("GET", "/metrics", headers)
    assert len(compared) == 3 * len(KEYS)
    assert {len(each) for each in compared} == {32}, "digests of one length"


def test_at_another_address_a_host_must_be_an_address_or_a_known_name() -> None:
    guard = Guard.make("0.0.0.0", names=["model.example"], keys=KEYS)

    def check(host: str) -> None:
        guard.check("GET", "/health", [(b"host", host.encode())])

    for host in ("192.168.1.7:8000", "[fe80::1]:8000", "model.example", "MODEL.example:443", "localhost"):
        check(host)
    for host in ("evil.example", "model.example.evil.example", "1.2.3.4.evil.example"):
        with pytest.raises(ApiError, match="--allow-host"):
            check(host)
    assert is_loopback("127.0.0.1")
    assert is_loopback("127.8.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.7", "example.com")))


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\nsk-one-key\r\n  sk-two-key  \n")
    assert read_keys(path) == ("sk-one-key", "sk-two-key")
    for content, says in (
        (b"", "has 0 API keys; write 1 to 1,000, one a line"),
        (b"# none\n", "has 0 API keys"),
        (b"ok\nsecret key\n", "line 2: a key must have letters, digits and signs of ASCII alone, without spaces"),
        ("schlüssel\n".encode(), "line 1: a key must have"),
        (b"\xff\xfe", "is not a text of API keys"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"keys") as refused:
            read_keys(path)
        assert says in str(refused.value)
        assert "secret" not in str(refused.value), "no key is shown"
    with pytest.raises(OSError, match="No such file"):
        read_keys(tmp_path / "missing")
