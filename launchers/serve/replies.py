"""What is sent back: whole answers and the chunks of a stream, in the forms of OpenAI's two endpoints."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trimaran.launchers.serve.answers import Piece, Scored, Usage
from trimaran.launchers.serve.errors import ApiError, json_bytes
from trimaran.launchers.serve.token_text import TokenText

LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON has not, as in OpenAI's API."""
DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": still here\n\n"


@dataclass(frozen=True)
class Reply:
    """The form of one answer.

    Args:
        created: seconds since 1970.
        tells_logprobs: whether choices have log-probabilities.
        tells_usage: whether a stream ends with the usage.
    """

    is_chat: bool
    model: str
    created: int
    tokens: TokenText
    num_choices: int
    tells_logprobs: bool
    tells_usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))

    def start(self) -> bytes:
        """Return what a stream begins with: in a chat, who speaks."""
        if not self.is_chat:
            return b""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._event([self._delta(index, delta, None)]) for index in range(self.num_choices))

    def chunk(self, index: int, piece: Piece, told: dict[str, Any] | None = None) -> bytes:
        """Return what is new of one choice, as an event of a stream.

        Args:
            told: what the answer tells beside its text, with the last piece.
        """
        logprobs = self._logprobs(piece.scored) if self.tells_logprobs else None
        if self.is_chat:
            delta = {"content": piece.text} if piece.text or piece.scored else {}
            return self._event([self._delta(index, delta, piece.finish) | {"logprobs": logprobs}], told=told)
        return self._event([{"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}])

    def end(self, usage: Usage) -> bytes:
        """Return what a stream ends with."""
        return (self._event([], usage.record()) if self.tells_usage else b"") + DONE

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: Usage, told: dict[str, Any] | None = None) -> bytes:
        """Return the answer that is no stream.

        Args:
            pieces: of each choice.
            told: what the answer tells beside its text; of a twin, whose `text` then is the answer's.
        """
        choices = []
        for index, parts in enumerate(pieces):
            text = "".join(each.text for each in parts) if told is None or "text" not in told else told["text"]
            scored = [each for part in parts for each in part.scored]
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {
                    "index": index,
                    **(content if self.is_chat else {"text": text}),
                    "logprobs": self._logprobs(scored) if self.tells_logprobs else None,
                    "finish_reason": parts[-1].finish,
                }
            )
        more = {} if told is None else {"trimaran": told}
        return json_bytes(self._head("") | {"choices": choices, "usage": usage.record()} | more)

    def _head(self, chunk: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", f"chat.completion{chunk}") if self.is_chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _event(
        self,
        choices: list[dict[str, Any]],
        usage: dict[str, Any] | None = None,
        told: dict[str, Any] | None = None,
    ) -> bytes:
        record = self._head(".chunk") | {"choices": choices} | ({"usage": usage} if self.tells_usage else {})
        record |= {} if told is None else {"trimaran": told}
        return b"data: " + json_bytes(record) + b"\n\n"

    def _delta(self, index: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_token(each) for each in scored], "refusal": None}
        return {
            "tokens": [self.tokens.name_of(each.token) for each in scored],
            "token_logprobs": [_finite(each.logprob) for each in scored],
            "top_logprobs": [self._top(each) for each in scored],
            "text_offset": [each.offset for each in scored],
        }

    def _top(self, scored: Scored) -> dict[str, float | None] | None:
        """Return the likeliest tokens of one place and the one that is there, None where nothing was foretold."""
        if scored.logprob is None:
            return None
        found = {self.tokens.name_of(token): _finite(logprob) for token, logprob in reversed(scored.top)}
        own = {self.tokens.name_of(scored.token): _finite(scored.logprob)} if scored.top else {}
        return dict(reversed(found.items())) | own

    def _chat_token(self, scored: Scored) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in scored.top]
        return self._named(scored.token, scored.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self.tokens.bytes_of(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def error_event(error: ApiError) -> bytes:
    """Return an error as the last event of a stream that has begun."""
    return b"data: " + error.body() + b"\n\n"


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB
