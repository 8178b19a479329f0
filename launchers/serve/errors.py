"""Errors of a request, in the form in which OpenAI's clients expect them."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

_KINDS: Final = MappingProxyType({429: "rate_limit_error"})
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: a sentence for whoever made the request.
        param: the field of the request that is the cause.
        code: a word for programs.
        headers: that the answer has besides.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> bytes:
        """Return the JSON of the answer."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json_bytes({"error": error})


def wrong(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return the error of a request whose field has a value that can't be used."""
    return ApiError(400, message, param=param, code=code)


def json_bytes(value: Any) -> bytes:
    """Return a value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")
