"""Who may use the port: pages of the server itself and programs, by their Host, Origin and key.

A page of another site can send requests to 127.0.0.1 from its reader's browser, and by DNS rebinding under the name of
that site. Its requests carry an Origin, a Sec-Fetch-Site or a Host that gives them away.
"""

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from trimaran.launchers.serve.errors import ApiError
from trimaran.runtime.files import read_text

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN_PATHS: Final = frozenset({"/", "/health"})
"""What needs no key: the page, which asks for it, and the state of the server."""
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_MOST_KEYS = 1000
_KEY_BYTES = 1 << 20


@dataclass(frozen=True)
class Guard:
    """What is asked of every request before anything else.

    Args:
        hosts: names under which the server may be called, besides addresses where `any_address` says so.
        any_address: whether the Host may be any IP address; a rebound name is none.
        keys: SHA-256 of each key; () where none is needed.
    """

    hosts: frozenset[str]
    any_address: bool
    keys: tuple[bytes, ...] = ()

    @classmethod
    def make(cls, host: str, names: Iterable[str] = (), keys: Sequence[str] = ()) -> "Guard":
        """Return the guard of a server.

        Args:
            host: the address that it listens at.
            names: others under which it is called, such as a proxy's.
        """
        is_local = is_loopback(host)
        hosts = {host, *_LOOPBACK_NAMES, *names} | (set() if is_local else {socket.gethostname(), socket.getfqdn()})
        digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        return cls(frozenset(each.lower() for each in hosts), not is_local, digests)

    def check(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Raise ApiError for a request that may not be answered."""
        self._check_host(headers)
        self._check_site(method, path, headers)
        if self.keys and path not in OPEN_PATHS and not self._has_key(headers):
            raise ApiError(
                401,
                "this server needs an API key: send one of its keys as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_host(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        given = _values(headers, b"host")
        name = _host_name(given[0]) if len(given) == 1 else None
        if name is None or (name not in self.hosts and not (self.any_address and _is_address(name))):
            raise ApiError(
                403, "the Host of this request is not this server's; call it by its address, or name it in --allow-host"
            )

    def _check_site(self, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        site, mode = _values(headers, b"sec-fetch-site"), _values(headers, b"sec-fetch-mode")
        follows_link = method in ("GET", "HEAD") and path == "/" and mode == ["navigate"]
        is_foreign = bool(site) and site[0] not in ("same-origin", "none") and not follows_link
        for origin in _values(headers, b"origin"):
            is_foreign |= urlsplit(origin).netloc.lower() != _values(headers, b"host")[0].lower()
        if is_foreign:
            raise ApiError(403, "this request comes from a page of another site, which may not use this server")

    def _has_key(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request has one of the keys; takes as long for any wrong one."""
        given = _values(headers, b"authorization")
        scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        matches = [hmac.compare_digest(digest, each) for each in self.keys]
        return scheme.lower() == "bearer" and any(matches)

    def around(self, app: App, refuse: Callable[[ApiError], App]) -> App:
        """Return the application behind this guard, with the headers that every answer has.

        Args:
            refuse: returns the application that answers with an error.
        """

        async def guarded(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start":
                    own = {name.lower() for name, _ in message["headers"]}
                    message["headers"] = [*message["headers"], *(each for each in _HEADERS if each[0] not in own)]
                await send(message)

            try:
                self.check(scope["method"], scope["path"], scope["headers"])
            except ApiError as error:
                await refuse(error)(scope, receive, sending)
                return
            await app(scope, receive, sending)

        return guarded


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the API keys of a file, one a line; blank lines and lines that begin with # are none.

    Raises:
        ValueError: there is none, or a line has other characters than a header can carry. No key is named.
        OSError: the file can't be read.
    """
    try:
        lines = read_text(path, _KEY_BYTES).splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text of API keys; write one key a line") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, key) for number, key in found if key and not key.startswith("#")]
    for number, key in found:
        if not all("!" <= character <= "~" for character in key):
            raise ValueError(
                f"{path}, line {number}: a key must have letters, digits and signs of ASCII alone, without spaces"
            )
    if not 0 < len(found) <= _MOST_KEYS:
        raise ValueError(f"{path} has {len(found)} API keys; write 1 to {_MOST_KEYS:,}, one a line")
    return tuple(key for _, key in found)


def _values(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for each, value in headers if each == name]


def _host_name(host: str) -> str | None:
    """Return the name in a Host header, without port, brackets and the dot at its end; None where it is none."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return None if name is None or "@" in host or "/" in host else name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
