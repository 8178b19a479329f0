"""The records of requests to /v1/chat/completions and /v1/completions, and sentences about what is wrong in one.

A field that would change the answer and isn't supported is an error, never passed over.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimaran.launchers.serve.errors import ApiError, wrong
from trimaran.runtime.files import parse_json
from trimaran.runtime.infer.chat import Message

MOST_MESSAGES: Final = 2048
"""Of a conversation, and parts of a message, as in OpenAI's API: each costs time whatever is in it."""
MOST_STOPS: Final = 16
MOST_TOP_LOGPROBS: Final = 20
USUAL_LENGTH: Final = 16
"""Tokens of a completion where the request says nothing, as in OpenAI's API."""
_LONGEST_STOP = 1000
_SHOWN = 100
_HALF = re.compile("[\ud800-\udfff]")
_IDENTIFYING: Final = frozenset({"user", "safety_identifier", "prompt_cache_key"})
"""They tell who asks, and change no answer."""
_NEUTRAL: Final = MappingProxyType(
    {
        "audio": (None,),
        "function_call": (None, "none"),
        "functions": (None, []),
        "logit_bias": (None, {}),
        "metadata": (None, {}),
        "modalities": (None, ["text"]),
        "parallel_tool_calls": (None, False, True),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "suffix": (None, ""),
        "tool_choice": (None, "none"),
        "tools": (None, []),
        "verbosity": (None,),
        "web_search_options": (None,),
    }
)
"""Fields of OpenAI's API that are not supported -> their values that ask for nothing."""
_ROLES: Final = MappingProxyType({"system": "system", "developer": "system", "user": "user", "assistant": "assistant"})


class StreamOptions(BaseModel):
    """What a stream has besides text; `include_obfuscation` is padding, of which there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Any = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    top_p: float | None = Field(None, gt=0, le=1)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check(self) -> None:
        """Raise ApiError where fields don't go together, or a text of them is none."""
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options is for streams; set stream to true, or leave it out")
        if self.stop is not None and not isinstance(self.stop, str):
            if not isinstance(self.stop, list) or not all(isinstance(each, str) for each in self.stop):
                raise wrong("stop", f"stop must be a text or a list of texts; it is {_shown(self.stop)}")
            if len(self.stop) > MOST_STOPS:
                raise wrong("stop", f"stop has {len(self.stop)} texts; it may have at most {MOST_STOPS}")
        for each in self.stops:
            check_text(each, "stop")
            if not 0 < len(each) <= _LONGEST_STOP:
                raise wrong("stop", f"a text of stop must have 1 to {_LONGEST_STOP:,} characters; it has {len(each)}")


class ChatRequest(_Common):
    """A request to /v1/chat/completions."""

    messages: list[Any] = Field(min_length=1)
    logprobs: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None for as many as the context takes."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raise ApiError where fields don't go together."""
        super().check()
        if len(self.messages) > MOST_MESSAGES:
            raise wrong(
                "messages",
                f"a conversation may have at most {MOST_MESSAGES:,} messages, and this one has {len(self.messages):,}; "
                "leave the oldest out, or begin a new one",
                "array_above_max_length",
            )
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise wrong("max_tokens", "give either max_completion_tokens or max_tokens, not both")
        if self.max_tokens == 0:
            raise wrong("max_tokens", "max_tokens (0) must be at least 1 for an answer")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs; set logprobs to true, or leave it out")

    def conversation(self) -> list[Message]:
        """Return the messages with texts as content; ApiError for other content."""
        return [_message(each, f"messages[{number}]") for number, each in enumerate(self.messages)]


class CompletionRequest(_Common):
    """A request to /v1/completions."""

    prompt: Any
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    def limit(self) -> int | None:
        """Most tokens of a continuation; None for `USUAL_LENGTH`, or as many as the context takes."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many of the likeliest tokens are told with each token; None for no log-probabilities."""
        return self.logprobs

    def check(self) -> None:
        """Raise ApiError where fields don't go together."""
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise wrong("best_of", f"best_of ({self.best_of}) is not supported; set n, or leave it out")

    def prompts(self, vocab_size: int) -> list[str | list[int]]:
        """Return the prompts, each a text or token ids.

        Raises:
            ApiError: it is neither, nor a list of them, or a token is not in the vocabulary.
        """
        given = self.prompt
        if isinstance(given, str) or _are_tokens(given):
            given = [given]
        if not isinstance(given, list) or not given:
            raise wrong("prompt", f"prompt must be a text, token ids, or a list of them; it is {_shown(given)}")
        for number, each in enumerate(given):
            where = "prompt" if given is not self.prompt else f"prompt[{number}]"
            if isinstance(each, str):
                check_text(each, where)
            elif not _are_tokens(each):
                raise wrong("prompt", f"{where} must be a text or a list of token ids; it is {_shown(each)}")
            elif not 0 <= min(each) <= max(each) < vocab_size:
                token = min(each) if min(each) < 0 else max(each)
                raise wrong(
                    "prompt",
                    f"{where} has the token {_shown(token)}, and the model's tokens are 0 to {vocab_size - 1}",
                )
        return list(given)


_Record = TypeVar("_Record", bound=_Common)


def parse_request(body: bytes, record: type[_Record]) -> _Record:
    """Return the checked request of a body.

    Raises:
        ApiError: the body is not JSON, or a field is missing, unknown, unsupported or has a wrong value; it names the
            field.
    """
    try:
        raw = parse_json(body, _refuse_constant)
    except ValueError as error:
        raise wrong(None, f"the body is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise wrong(None, f"the body must be a JSON object; it is {_shown(raw)}")
    fields = {name: value for name, value in raw.items() if not _is_passed_over(name, value, record)}
    try:
        request = record.model_validate(fields)
    except ValidationError as error:
        raise _first_of(error) from None
    request.check()
    return request


def check_text(text: str, where: str) -> None:
    """Raise ApiError where a text has half of a surrogate pair, which is no character."""
    if found := _HALF.search(text):
        raise wrong(
            where.partition("[")[0],
            f"{where} has half of a surrogate pair (\\u{ord(found[0]):04x}) at character {found.start() + 1}, "
            "which is no character; send both halves, or UTF-8",
        )


def _is_passed_over(name: str, value: Any, record: type[BaseModel]) -> bool:
    """Return whether a field changes no answer; ApiError for one that would and is not supported."""
    if name in record.model_fields:
        return False
    if name in _IDENTIFYING or any(value == each and type(value) is type(each) for each in _NEUTRAL.get(name, ())):
        return True
    if name in _NEUTRAL:
        raise wrong(name, f"{name} is not supported by this server; leave it out", "unsupported_parameter")
    shown = name[:_SHOWN].encode("utf-8", "replace").decode()
    near = difflib.get_close_matches(name[:_SHOWN], record.model_fields, 1)
    raise wrong(shown, f"unknown field {shown!r}" + (f"; is {near[0]} meant?" if near else ""), "unknown_parameter")


def _first_of(error: ValidationError) -> ApiError:
    """Return the first wrong field as an error."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return wrong(param, f"{param} is missing")
    what = first["msg"].removeprefix("Input ")
    return wrong(param, f"{param} ({_shown(first['input'])}) {what}")


def _message(raw: Any, where: str) -> Message:
    """Return one message with a text as its content."""
    if not isinstance(raw, Mapping):
        raise wrong("messages", f"{where} must be an object with role and content; it is {_shown(raw)}")
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong("messages", f"{where}.role must be one of {', '.join(_ROLES)}; it is {_shown(role)}")
    for name, value in raw.items():
        if name not in ("role", "content", "name") and value not in (None, []):
            raise wrong("messages", f"{where} has {_shown(name)}, which is not supported; leave it out")
    content = raw.get("content")
    if isinstance(content, list):
        if len(content) > MOST_MESSAGES:
            raise wrong(
                "messages", f"{where}.content has {len(content):,} parts; it may have at most {MOST_MESSAGES:,}"
            )
        content = "".join(_part(each, f"{where}.content[{number}]") for number, each in enumerate(content))
    if not isinstance(content, str):
        raise wrong("messages", f"{where}.content must be a text or a list of text parts; it is {_shown(content)}")
    message = {"role": _ROLES[role], "content": content}
    if raw.get("name") is not None:
        message["name"] = raw["name"]
        if not isinstance(raw["name"], str):
            raise wrong("messages", f"{where}.name must be a text; it is {_shown(raw['name'])}")
    for name, text in message.items():
        check_text(text, f"messages{where.removeprefix('messages')}.{name}")
    return message


def _part(raw: Any, where: str) -> str:
    """Return the text of one part of a message."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("type"), str):
        raise wrong("messages", f"{where} must be an object with type and text; it is {_shown(raw)}")
    if raw["type"] != "text":
        raise wrong(
            "messages",
            f"{where} has the type {_shown(raw['type'])}, which is not supported: this model reads text only",
            "unsupported_content",
        )
    if raw.keys() - {"type", "text"} or not isinstance(raw.get("text"), str):
        raise wrong("messages", f"{where} must have type and text alone, the latter a text")
    return str(raw["text"])


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _shown(value: Any) -> str:
    """Return the beginning of a value, readable whatever is in it."""
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str) and len(value) > 20:
        return f"{'a list' if isinstance(value, Sequence) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
