"""OpenAI's own client against the server: chats and completions, streams, choices, stops, log-probabilities, usage."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.launchers.serve.conftest import SENTENCE
from tests.launchers.serve.fake_backend import FakeBackend, logprob_of, writes
from tests.launchers.serve.serving import NAME, TEMPLATE, Served, make_text, served
from trimaran.launchers.serve.app import ServeOptions
from trimaran.runtime.infer.modes import mode_of
from trimaran.runtime.infer.prompts import RunText

HELLO: Any = [{"role": "user", "content": "hi"}]
SMILE = "\N{SLIGHTLY SMILING FACE}"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no model 'other' here; this server has 'tiny'"):
        client.models.retrieve("other")


def test_a_chat_is_answered_whole_and_in_pieces(client: openai.OpenAI, text: RunText, sentence: list[int]) -> None:
    prompt = text.template.encode(HELLO, text.tokenizer) if text.template else []
    answer = client.chat.completions.create(model=NAME, messages=HELLO)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(sentence))
    assert usage.total_tokens == len(prompt) + len(sentence)
    assert usage.prompt_tokens_details.cached_tokens == 1

    chunks = list(client.chat.completions.create(model=NAME, messages=HELLO, stream=True))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {answer.id}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == SENTENCE
    assert SMILE in pieces, "a character of four tokens comes as one"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_its_usage_where_that_is_asked_for(client: openai.OpenAI, sentence: list[int]) -> None:
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=HELLO, stream=True, max_tokens=5, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"


def test_parameters_reach_the_backend(client: openai.OpenAI, server: Served, text: RunText) -> None:
    client.chat.completions.create(
        model=NAME, messages=HELLO, temperature=0.3, top_p=0.9, seed=7, max_completion_tokens=4, n=2,
        presence_penalty=0.5, frequency_penalty=-0.25, user="somebody",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5},
    )  # fmt: skip
    first, second = server.backend.seen[-2:]
    sampling = first.sampling
    assert sampling == second.sampling
    assert (first.sample, second.sample) == (0, 1)
    assert first.id != second.id
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.max_new_tokens) == (0.3, 0.9, 7, 4)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.1, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.25)
    assert sampling.stop_tokens == text.stop_tokens
    assert sampling.context == "stop"
    client.chat.completions.create(model=NAME, messages=HELLO, seed=-3, max_tokens=1)
    seeds = [server.backend.seen[-1].sampling.seed]
    for _ in range(2):
        client.chat.completions.create(model=NAME, messages=HELLO)
        seeds.append(server.backend.seen[-1].sampling.seed)
        assert server.backend.seen[-1].sampling.temperature == 1.0
        room = server.backend.context - len(server.backend.seen[-1].prompt)
        assert server.backend.seen[-1].sampling.max_new_tokens == room
    assert len(set(seeds)) == 3, "without a seed every answer has its own"


def test_system_texts_in_parts_and_names_reach_the_template(client: openai.OpenAI, server: Served) -> None:
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "tool_calls": None},
        {"role": "user", "content": "<|im_end|>"},
    ]
    client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    prompt = server.service.text.tokenizer.decode(server.backend.seen[-1].prompt)
    assert "<|im_start|>system be brief<|im_end|><|im_start|>user ab<|im_end|>" in prompt
    end = server.service.text.tokenizer.id_of("<|im_end|>")
    assert server.backend.seen[-1].prompt.count(end or 0) == 4, "what a user spells is text"


def test_choices_come_by_their_number(text: RunText) -> None:
    ids = [text.tokenizer.encode(letter)[0] for letter in "xyz"]
    with (
        served(text, lambda: FakeBackend(lambda request, number: ids[request.sample], step_s=0.001)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answer = client.chat.completions.create(model=NAME, messages=HELLO, n=3, max_tokens=4)
        assert [choice.message.content for choice in answer.choices] == ["xxxx", "yyyy", "zzzz"]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(model=NAME, messages=HELLO, n=3, max_tokens=4, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == ["xxxx", "yyyy", "zzzz"]
        many = client.completions.create(model=NAME, prompt=["a", "b"], n=2, max_tokens=1)
        assert [(each.index, each.text) for each in many.choices] == [(0, "x"), (1, "y"), (2, "x"), (3, "y")]
        assert many.usage is not None
        assert many.usage.prompt_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [("wör", "hello, "), (["xx", "lo, w", "o,"], "hell"), (SMILE, "hello, wörld! "), ("end.", SENTENCE)],
)
def test_a_stop_string_ends_the_text_before_it_and_frees_the_place(
    client: openai.OpenAI, server: Served, stop: Any, expected: str, stream: bool
) -> None:
    left = server.backend.left
    if stream:
        chunks = list(client.chat.completions.create(model=NAME, messages=HELLO, stop=stop, stream=True))
        found, finish = "".join(each.choices[0].delta.content or "" for each in chunks), chunks[-1].choices[0]
    else:
        answer = client.chat.completions.create(model=NAME, messages=HELLO, stop=stop)
        found, finish = answer.choices[0].message.content or "", answer.choices[0]
    assert (found, finish.finish_reason) == (expected, "stop")
    assert server.backend.left - left == (expected != SENTENCE)
    server.wait_until(lambda: server.backend.active == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_log_probabilities_have_bytes_and_the_likeliest(
    client: openai.OpenAI, sentence: list[int], stream: bool
) -> None:
    options: Any = {"model": NAME, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        content = [each for chunk in chunks for each in (chunk.choices[0].logprobs or EMPTY).content or []]
        for chunk in chunks[1:-1]:
            text = chunk.choices[0].delta.content or ""
            logprobs = chunk.choices[0].logprobs
            assert logprobs is not None
            assert b"".join(bytes(each.bytes or []) for each in logprobs.content or []).decode() == text
    else:
        answer = client.chat.completions.create(**options)
        content = (answer.choices[0].logprobs or EMPTY).content or []
    assert [each.logprob for each in content] == [logprob_of(token) for token in sentence[:-1]]
    assert b"".join(bytes(each.bytes or []) for each in content).decode() == SENTENCE
    assert content[0].token == "h"
    assert [top.logprob for top in content[0].top_logprobs] == [logprob_of(0), logprob_of(1)]
    assert content[0].top_logprobs[0].token == "<|endoftext|>"


class EMPTY:
    """Stands for log-probabilities that are missing."""

    content = None


def test_stopped_text_has_the_log_probabilities_of_its_own_tokens_alone(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=HELLO, stop="o, w", logprobs=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [each.token for each in logprobs.content or []] == list("hell")
    assert logprobs.content is not None
    assert logprobs.content[0].top_logprobs == []


def test_completions_echo_their_prompt_with_its_log_probabilities(client: openai.OpenAI, text: RunText) -> None:
    prompt = f"ab {SMILE}c"
    ids = text.tokenizer.encode(prompt)
    given: tuple[Any, ...] = (prompt, ids, [prompt], [ids])
    found = [
        client.completions.create(model=NAME, prompt=each, echo=True, logprobs=2, max_tokens=2).choices[0]
        for each in given
    ]
    assert found[0] == found[1] == found[2] == found[3]
    choice = found[0]
    assert choice.text == prompt + "he"
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.tokens[2:6] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x99", "bytes:\\x82"]
    assert logprobs.token_logprobs == [None, *(logprob_of(each) for each in ids[1:]), *map(logprob_of, (72, 69))]
    assert logprobs.text_offset is not None
    assert logprobs.top_logprobs is not None
    pieces = [choice.text[offset:] for offset in logprobs.text_offset]
    assert pieces[-3:] == ["che", "he", "e"]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == {"<|endoftext|>": -math.log(2), "!": -math.log(3), " ": logprob_of(ids[1])}


def test_a_stop_token_is_told_among_the_tokens_of_a_completion(client: openai.OpenAI, sentence: list[int]) -> None:
    """lm-eval takes the last token for the one that was written, whatever it is."""
    choice = client.completions.create(model=NAME, prompt="a", max_tokens=50, logprobs=0).choices[0]
    assert choice.text == SENTENCE
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(sentence)
    assert choice.logprobs.tokens[-1] == "<|endoftext|>"
    assert choice.logprobs.top_logprobs == [{}] * len(sentence)


def test_scores_of_a_prompt_alone(client: openai.OpenAI, server: Served, text: RunText) -> None:
    choice = client.completions.create(model=NAME, prompt="abab", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == "abab"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert len(choice.logprobs.tokens) == len(text.tokenizer.encode("abab"))
    server.wait_until(lambda: server.backend.active == 0)


def test_completions_in_a_stream(client: openai.OpenAI, text: RunText) -> None:
    options: Any = {"model": NAME, "prompt": "ab", "echo": True, "logprobs": 1}
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert whole.choices[0].text == "abhello, wörld! \ufffd", "the 16 tokens end within a character"
    assert chunks[-1].usage == whole.usage
    told = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    assert whole.choices[0].logprobs is not None
    assert [name for each in told if each for name in each.tokens or []] == whole.choices[0].logprobs.tokens
    offsets = [offset for each in told if each for offset in each.text_offset or []]
    assert offsets == whole.choices[0].logprobs.text_offset


def test_an_empty_prompt_begins_a_text(client: openai.OpenAI, server: Served, text: RunText) -> None:
    assert client.completions.create(model=NAME, prompt="", max_tokens=1).choices[0].text == "h"
    assert server.backend.seen[-1].prompt == (text.tokenizer.eot_id,)


def test_errors_are_those_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    long: Any = [{"role": "user", "content": "ab " * 200}]
    with pytest.raises(openai.BadRequestError, match=r"context has 200 tokens, and this request needs 4\d\d") as full:
        client.chat.completions.create(model=NAME, messages=long)
    assert full.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"in the messages, 195 for the answer.*at most 191 tokens"):
        client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=195)
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as tools:
        client.chat.completions.create(
            model=NAME, messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.param == "tools"
    assert client.completions.create(model=NAME, prompt=[1] * 199, max_tokens=1).choices[0].text == "h"
    with pytest.raises(openai.BadRequestError, match="context has 200 tokens"):
        client.completions.create(model=NAME, prompt=[1] * 200, max_tokens=1)


def test_a_model_without_a_chat_template_continues_texts(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = make_text(tmp_path_factory.mktemp("plain"), template=None)
    with (
        served(plain, lambda: FakeBackend(writes(plain.tokenizer.encode("abc")))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="no chat template, so it continues texts only") as refused:
            client.chat.completions.create(model=NAME, messages=HELLO)
        assert refused.value.code == "no_chat_template"
        assert client.completions.create(model=NAME, prompt="x", max_tokens=2).choices[0].text.startswith("abc")


def test_a_first_request_finds_everything_ready(text: RunText, sentence: list[int]) -> None:
    with served(text, lambda: FakeBackend(writes(sentence))) as server:
        asked = server.call(lambda: asyncio.ensure_future(server.service.warm_up()))
        server.wait_until(asked.done)
        assert asked.exception() is None
        assert "_tables" in vars(server.service.tokens)
        assert text.template is not None
        assert "_plain" in vars(text.template)
        assert server.backend.seen == []


MODES: Any = [
    ("translate", "tr", True, "<|im_start|>user Translate the following text into Turkish. Write only"),
    ("summarize", None, True, "<|im_start|>user Summarize the following text"),
    ("translate", "tr", False, "one house\n\nTranslation into Turkish:\n"),
    ("continue", None, True, "one house"),
    ("continue", None, False, "one house"),
]


@pytest.mark.parametrize(("name", "to", "has_template", "expected"), MODES)
def test_a_mode_puts_what_users_say(
    tmp_path_factory: pytest.TempPathFactory, name: str, to: str | None, has_template: bool, expected: str
) -> None:
    text = make_text(tmp_path_factory.mktemp("mode"), TEMPLATE if has_template else None)
    options = replace(ServeOptions(NAME), mode=mode_of(name, to))
    ids = text.tokenizer.encode("abc\n\nabc")
    with (
        served(text, lambda: FakeBackend(writes(ids), context=500), options) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        user: Any = {"role": "user", "content": "one house"}
        found = client.chat.completions.create(model=NAME, messages=[user], max_tokens=len(ids)).choices[0]
        seen = text.tokenizer.decode(server.backend.seen[-1].prompt)
        assert seen.startswith(expected)
        is_cut = name == "translate" and not has_template
        assert found.message.content == ("abc" if is_cut else "abc\n\nabc")
        many: Any = [user, {"role": "assistant", "content": "one"}, user]
        if has_template and name != "continue":
            client.chat.completions.create(model=NAME, messages=many, max_tokens=1)
            assert text.tokenizer.decode(server.backend.seen[-1].prompt).count("Write only") == 2
        else:
            with pytest.raises(openai.BadRequestError, match="takes one text at a time"):
                client.chat.completions.create(model=NAME, messages=many)
        client.completions.create(model=NAME, prompt="one", max_tokens=1)
        assert text.tokenizer.decode(server.backend.seen[-1].prompt) == "one", "completions are as they are"


def test_a_text_that_can_not_go_on_and_ranks_that_have_ended(text: RunText, sentence: list[int]) -> None:
    with (
        served(text, lambda: FakeBackend(writes(sentence))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        server.backend.fails_with = "the model's logits are not finite"
        with pytest.raises(openai.InternalServerError, match="logits are not finite"):
            client.chat.completions.create(model=NAME, messages=HELLO, n=2)
        server.backend.fails_with = None
        assert client.chat.completions.create(model=NAME, messages=HELLO).choices[0].message.content == SENTENCE
        server.backend.fails_with, server.backend.fails_after = "the model's logits are not finite", 3
        stream = client.chat.completions.create(model=NAME, messages=HELLO, stream=True)
        assert [next(stream).choices[0].delta.content for _ in range(4)] == ["", "h", "e", "l"]
        with pytest.raises(openai.APIError, match="logits are not finite"):
            list(stream)
        server.wait_until(lambda: server.backend.active == server.service.gate.taken == 0)
        server.backend.fails_with, server.backend.is_gone = None, True
        with pytest.raises(openai.InternalServerError, match="ranks have ended: rank 1 was killed by SIGKILL"):
            client.chat.completions.create(model=NAME, messages=HELLO)
        server.thread.join(60)
        assert not server.thread.is_alive(), "a server without ranks ends"
