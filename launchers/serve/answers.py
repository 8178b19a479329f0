"""From a checked request to the requests of the backend, and from their events back to text and log-probabilities."""

import codecs
import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimaran.launchers.serve.errors import ApiError, wrong
from trimaran.launchers.serve.grounded import Ground, Put, put
from trimaran.launchers.serve.openai import USUAL_LENGTH, ChatRequest, CompletionRequest
from trimaran.launchers.serve.token_text import TokenText
from trimaran.runtime.infer.batching.messages import (
    Event,
    Failed,
    NewToken,
    PromptScores,
    Request,
    TopLogprobs,
)
from trimaran.runtime.infer.chat import ChatError, Message
from trimaran.runtime.infer.modes import ANSWER, CONTINUE, Mode, passage_test, prompt_in_mode
from trimaran.runtime.infer.prompts import Prompt, RunText
from trimaran.runtime.infer.sampling_params import SamplingParams
from trimaran.runtime.infer.text import TextStream
from trimaran.runtime.twin.asking import Twin


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, None for the first of a prompt, at its place in the text of its choice."""

    token: int
    logprob: float | None
    top: TopLogprobs
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of one choice.

    Args:
        finish: why the choice has ended; None while it goes on.
    """

    text: str
    scored: tuple[Scored, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens: of the prompts, of them not computed again, and of what was written."""

    prompt: int
    cached: int
    new: int

    def record(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.new,
            "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass(frozen=True)
class LongText:
    """A text that goes to the model in passages.

    Args:
        stops: strings that end the answer to a passage, beside those of the mode.
        is_alone: whether earlier messages are left out.
    """

    mode: Mode
    text: str
    system: str | None
    sampling: SamplingParams
    stops: tuple[str, ...]
    is_alone: bool


@dataclass(frozen=True)
class Plan:
    """What a request asks for: one request of the backend for each choice.

    Args:
        echoes: of every choice, the text of its prompt where the answer begins with it.
        num_prompt_tokens: of all prompts together; the choices of one prompt share it.
        ground: what the answer is held to; None where it is no twin's.
        silence: the whole answer where a twin's texts are silent, and no request is made; else "".
        long: the text whose passages become requests while it is answered; None where the requests are there.
    """

    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    stops: tuple[str, ...]
    num_prompt_tokens: int
    ground: Ground | None = None
    silence: str = ""
    long: LongText | None = None

    @property
    def num_choices(self) -> int:
        """How many choices the answer has."""
        return max(1, len(self.requests))


class Planner:
    """Makes the backend's requests. For one thread at a time: the tokenizer changes while it encodes.

    Args:
        text: how the model reads and writes; `stop_tokens` are in its vocabulary.
        context: most tokens of a prompt and its continuation.
        most_choices: that one request may ask for.
        mode: what becomes of a user's text in a chat; completions are continued as they are.
        twin: whose library chats are answered from; None for the weights alone.
        ids: of requests, where others ask the same backend.
    """

    def __init__(
        self,
        text: RunText,
        context: int,
        most_choices: int,
        mode: Mode = ANSWER,
        twin: Twin | None = None,
        ids: Iterator[int] | None = None,
    ) -> None:
        self._text, self._context, self._most_choices, self._mode = text, context, most_choices, mode
        self._twin = twin if mode == ANSWER else None
        self._ids = itertools.count(1) if ids is None else ids

    def chat(self, request: ChatRequest) -> Plan:
        """Return the plan of an answer in a conversation; ApiError where the model has none, or no room."""
        messages = request.conversation()
        if self._text.template is None and self._mode == ANSWER:
            raise wrong(
                "messages",
                "this model has no chat template, so it continues texts only; use /v1/completions, write the template "
                "to chat_template.jinja in the run's folder, or start the server with --mode continue",
                "no_chat_template",
            )
        try:
            prompt, put = self._text.encode(self._in_mode(messages)), None
            if self._mode.is_by_passages and (long := self._long_text(request, messages, len(prompt))):
                return Plan((), (), (), 0, long=long)
            if self._twin is not None and len(prompt) < self._context:
                put = self._put(self._twin, request, messages, self._context - len(prompt))
                if put.silence:
                    return Plan((), (), (), len(prompt), put.ground, put.silence)
                prompt = self._text.encode(Prompt(None, put.messages))
        except ChatError as error:
            raise wrong("messages", str(error)) from None
        stops = self._mode.stop_strings(has_template=self._text.template is not None)
        plan = self._plan(request, [prompt], [""], param="messages", stops=stops)
        return plan if put is None else replace(plan, ground=put.ground)

    def _long_text(self, request: ChatRequest, messages: Sequence[Message], num_prompt: int) -> LongText | None:
        """Return the last text of a conversation if it must go in passages, alone; None where all goes at once.

        It does where the context has no room for the conversation and the answer that is asked for, or, where no length
        is asked for, for an answer as long as passages get; and where a plain prompt's answer would end too early.

        Args:
            num_prompt: tokens of the whole conversation.
        """
        text = str(messages[-1]["content"])
        if messages[-1]["role"] != "user":
            return None
        system = "\n\n".join(str(each["content"]) for each in messages if each["role"] == "system") or None
        has_template = self._text.template is not None
        asked = request.limit or self._context // 2

        def encode(passage: str) -> list[int]:
            return self._text.encode(prompt_in_mode(self._mode, passage, has_template=has_template, system=system))

        fits = passage_test(self._mode, encode, self._context, asked, self._text)
        is_whole = fits(text) if request.limit is None else self._mode.may_be_passage(text, has_template=has_template)
        if (is_whole and num_prompt + asked <= self._context) or not fits(""):
            return None
        if (request.n or 1) > 1 or request.num_top is not None:
            name = "logprobs" if request.num_top is not None else "n"
            raise wrong(name, f"{name} is not for a text that goes in passages, as this one does: leave it out")
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        sampling = self._sampling(request, min(asked, self._context // 2), seed)
        is_alone = any(each["role"] != "system" for each in messages[:-1])
        return LongText(self._mode, text, system, sampling, request.stops, is_alone)

    def _put(self, twin: Twin, request: ChatRequest, messages: Sequence[Message], room: int) -> Put:
        """Return a conversation with passages of a twin's library."""
        if (request.n or 1) > 1:
            raise wrong("n", f"n ({request.n}) must be 1: a twin's answer is held to its passages, one at a time")
        try:
            return put(twin, messages, lambda text: len(self._text.tokenizer.encode(text)), room, request.limit)
        except ValueError as error:
            raise wrong("messages", str(error), "context_length_exceeded") from None

    def _in_mode(self, messages: Sequence[Message]) -> Prompt:
        """Return a conversation as the mode puts it to the model; ChatError where it can't."""
        mode, has_template = self._mode, self._text.template is not None
        if mode == ANSWER:
            return Prompt(None, tuple(messages))
        if has_template and mode != CONTINUE:
            put = [
                prompt_in_mode(mode, each["content"], has_template=True).messages if each["role"] == "user" else (each,)
                for each in messages
            ]
            return Prompt(None, tuple(each for part in put for each in part or ()))
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ChatError(
                f"this server takes one text at a time (--mode {mode.name}): send one message, the user's, and no other"
            )
        return prompt_in_mode(mode, messages[0]["content"], has_template=False)

    def completion(self, request: CompletionRequest) -> Plan:
        """Return the plan of the continuations of prompts; ApiError where one is not a prompt, or has no room."""
        given = request.prompts(self._text.tokenizer.vocab_size)
        self._check_choices(len(given) * (request.n or 1))
        prompts = [self._text.encode(Prompt(each)) if isinstance(each, str) else each for each in given]
        echoes = [""] * len(given)
        if request.echo:
            echoes = [each if isinstance(each, str) else self._text.tokenizer.decode(each) for each in given]
        return self._plan(request, prompts, echoes, param="prompt")

    def _plan(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        echoes: Sequence[str],
        *,
        param: str,
        stops: tuple[str, ...] = (),
    ) -> Plan:
        count = request.n or 1
        self._check_choices(len(prompts) * count)
        scores_prompt = isinstance(request, CompletionRequest) and bool(request.echo) and request.num_top is not None
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        requests = []
        for prompt in prompts:
            limit = self._limit(len(prompt), request.limit, param)
            for sample in range(count):
                sampling = self._sampling(request, limit, seed)
                requests.append(
                    Request(next(self._ids), tuple(prompt), sampling, sample, request.num_top, scores_prompt)
                )
        return Plan(
            tuple(requests),
            tuple(echo for echo in echoes for _ in range(count)),
            (*request.stops, *stops),
            sum(map(len, prompts)),
        )

    def _sampling(self, request: ChatRequest | CompletionRequest, limit: int, seed: int) -> SamplingParams:
        def given(value: float | None, otherwise: float) -> float:
            return otherwise if value is None else value

        try:
            return SamplingParams(
                # Where no token is asked for, `Choice` ends before the first.
                max_new_tokens=max(1, limit),
                temperature=given(request.temperature, 1.0),
                top_k=max(0, request.top_k or 0),
                top_p=given(request.top_p, 1.0),
                min_p=given(request.min_p, 0.0),
                repetition_penalty=given(request.repetition_penalty, 1.0),
                presence_penalty=given(request.presence_penalty, 0.0),
                frequency_penalty=given(request.frequency_penalty, 0.0),
                seed=seed,
                stop_tokens=self._text.stop_tokens,
                context="stop",
            )
        except ValueError as error:
            raise wrong(str(error).partition(" ")[0], str(error)) from None

    def _check_choices(self, count: int) -> None:
        if count > self._most_choices:
            raise wrong(
                "n", f"n times the prompts is {count} texts, more than the {self._most_choices} that this server holds"
            )

    def _limit(self, num_prompt: int, asked: int | None, param: str) -> int:
        """Return how many tokens a continuation may have; ApiError where prompt and continuation are too long."""
        room = self._context - num_prompt
        if room >= max(1, asked or 1):
            usual = min(room, USUAL_LENGTH) if param == "prompt" else room
            return usual if asked is None else asked
        needed = f"{num_prompt:,} in the {param}" + ("" if asked is None else f", {asked:,} for the answer")
        raise wrong(
            param,
            f"this model's context has {self._context:,} tokens, and this request needs "
            f"{num_prompt + max(1, asked or 1):,} ({needed}); shorten the {param}"
            + ("" if room < 1 else f", or ask for at most {room:,} tokens"),
            "context_length_exceeded",
        )


@dataclass
class Choice:
    """The text of one choice, as its events come.

    Args:
        is_empty: whether no token is asked for, only the prompt's scores.
        keeps_stop_token: whether a stop token is told among the scored tokens, as completions do.
    """

    request: Request
    tokenizer: TokenText
    stream: TextStream
    echo: str
    is_empty: bool
    keeps_stop_token: bool
    cached: int = 0
    num_new: int = 0
    _sent: int = 0
    _offset: int = 0
    _waiting: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, event: Event) -> Piece | None:
        """Return what an event adds to the choice; None for nothing that can be told yet.

        Raises:
            ApiError: the backend can't go on.
        """
        if isinstance(event, PromptScores):
            self.cached = event.cached
            return self._prompt(event)
        if isinstance(event, NewToken):
            return self._token(event)
        if isinstance(event, Failed):
            raise ApiError(500, event.message)
        return self._end("stop" if event.finish == "stop_token" else "length")

    def _prompt(self, event: PromptScores) -> Piece | None:
        scored: list[Scored] = []
        if self.request.scores_prompt:
            scores = itertools.chain((None,), event.logprobs)
            tops = itertools.chain(((),), event.top)
            for token, logprob, top in zip(self.request.prompt, scores, tops, strict=False):
                scored.append(Scored(token, logprob, top, self._offset))
                # A token that the tokenizer has put before the text is no part of it.
                if (
                    self._offset
                    or self.tokenizer.is_spelled(token)
                    or self.echo.startswith(self.tokenizer.name_of(token))
                ):
                    self._move(token)
        self._offset = len(self.echo)
        if not self.echo and not scored and not self.is_empty:
            return None
        return Piece(self.echo, tuple(scored), "length" if self.is_empty else None)

    def _token(self, event: NewToken) -> Piece | None:
        self.num_new += 1
        is_stop = event.token in self.request.sampling.stop_tokens
        if self.request.top_logprobs is not None and (self.keeps_stop_token or not is_stop):
            self._waiting.append(Scored(event.token, event.logprob, event.top, self._offset))
            self._move(event.token)
        if is_stop:
            return None
        if self.stream.add(event.token):
            return self._end("stop")
        return self._new(None)

    def _end(self, finish: str) -> Piece | None:
        if not self.stream.is_stopped:
            self.stream.finish()
        return self._new(finish)

    def _new(self, finish: str | None) -> Piece | None:
        """Return the text that is final, with the tokens that begin in it; at the end those without text too."""
        end = len(self.stream.text)
        text, self._sent = self.stream.text[self._sent : end], end
        if not text and finish is None:
            return None
        whole = len(self.echo) + end
        takes_all = finish is not None and not self.stream.is_stopped
        out = [each for each in self._waiting if takes_all or each.offset < whole]
        self._waiting = self._waiting[len(out) :]
        return Piece(text, tuple(out), finish)

    def _move(self, token: int) -> None:
        self._offset += len(self._characters.decode(self.tokenizer.bytes_of(token)))


def choices_of(plan: Plan, text: RunText, tokens: TokenText, *, is_chat: bool, is_empty: bool) -> list[Choice]:
    """Return the choices of a plan, in their order."""
    return [
        Choice(
            request,
            tokens,
            TextStream(text.tokenizer, request.prompt, plan.stops),
            echo,
            is_empty=is_empty,
            keeps_stop_token=not is_chat,
        )
        for request, echo in zip(plan.requests, plan.echoes, strict=True)
    ]
