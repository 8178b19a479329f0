"""What a talker (chat, serve, twin) and a model's ranks tell each other, as records and as lines of JSON. No torch."""

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

from trimaran.runtime.infer.sampling_params import SamplingParams

Finish = Literal["length", "stop_token", "context"]
TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens of one place and their log-probabilities, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue.

    Args:
        id: unique among all of one backend.
        prompt: token ids, at least one, fewer than the model's context.
        sampling: `sampling.context` is "stop": a served text never slides.
        sample: number of the choice among those of one prompt; the random numbers depend on (seed, sample) alone.
        top_logprobs: how many of the likeliest tokens each token comes with; None for no log-probabilities at all.
        scores_prompt: whether the prompt's own log-probabilities are told first.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    sample: int = 0
    top_logprobs: int | None = None
    scores_prompt: bool = False


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The prompt has been read.

    Args:
        cached: tokens of the prompt whose keys and values were still there.
        logprobs, top: of each prompt token but the first; empty unless the request scores its prompt.
    """

    request: int
    cached: int = 0
    logprobs: tuple[float, ...] = ()
    top: tuple[TopLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class NewToken:
    """The next token. Log-probabilities are of the model's own distribution, at temperature 1 and before any filter."""

    request: int
    token: int
    logprob: float | None = None
    top: TopLogprobs = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The text has ended, and its place is free."""

    request: int
    finish: Finish


@dataclass(frozen=True, slots=True)
class Failed:
    """The text can't go on; the message is a sentence for its user."""

    request: int
    message: str


Event = PromptScores | NewToken | Finished | Failed


class BackendGoneError(RuntimeError):
    """The ranks have ended; the message says why."""


class Backend(Protocol):
    """A model that continues texts, whatever its layout.

    Attributes:
        slots: texts that are continued at the same time; further requests wait in their order.
        context: most tokens of a prompt and its continuation.
    """

    slots: int
    context: int

    def submit(self, request: Request) -> AsyncIterator[Event]:
        """Yield PromptScores, then NewToken after NewToken, and at the end Finished or Failed.

        Closing the iterator (`aclose`, or the end of its task) before that cancels the request: its place is free
        within one token. BackendGoneError where the ranks end.
        """
        ...

    async def close(self, drain_s: float = 0.0) -> None:
        """Let what runs go on for at most that many seconds, then end the ranks."""
        ...


def encode_request(request: Request) -> bytes:
    """Return a request as one line of JSON."""
    return json.dumps(asdict(request)).encode() + b"\n"


def decode_request(fields: dict[str, Any]) -> Request:
    """Return the request of a parsed line."""
    sampling = {**fields["sampling"], "stop_tokens": tuple(fields["sampling"]["stop_tokens"])}
    return Request(**{**fields, "prompt": tuple(fields["prompt"]), "sampling": SamplingParams(**sampling)})


_KINDS: Final = MappingProxyType({each.__name__: each for each in (PromptScores, NewToken, Finished, Failed)})


def encode_event(event: Event) -> bytes:
    """Return an event as one line of JSON. NaN and infinities, which JSON has not, stand for themselves."""
    return json.dumps({"kind": type(event).__name__, **asdict(event)}).encode() + b"\n"


def decode_event(line: bytes) -> Event:
    """Return the event of a line of `encode_event`."""
    fields = json.loads(line)
    kind: type[Any] = _KINDS[fields.pop("kind")]
    if kind is NewToken:
        fields["top"] = tuple(map(tuple, fields["top"]))
    elif kind is PromptScores:
        fields["logprobs"] = tuple(fields["logprobs"])
        fields["top"] = tuple(tuple(map(tuple, each)) for each in fields["top"])
    event: Event = kind(**fields)
    return event
