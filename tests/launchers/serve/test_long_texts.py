"""A server that translates or summarizes takes texts beyond its context in passages, and tells so."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.launchers.serve.fake_backend import FakeBackend
from tests.launchers.serve.serving import NAME, Served, make_text, served
from trimaran.launchers.serve.app import ServeOptions
from trimaran.runtime.infer.batching.messages import Request
from trimaran.runtime.infer.modes import mode_of
from trimaran.runtime.infer.prompts import RunText

CONTEXT = 520
PARAGRAPHS = [f"{'abcdefghijklmno'[number]} the king of {number} ships sailed home." for number in range(15)]
LONG = "\n\n".join(PARAGRAPHS)
SYSTEM = {"role": "system", "content": "Be brief."}


def replies(text: RunText) -> Any:
    """A rule that writes the first letter of the first paragraph of its prompt, in capitals, and ends."""

    def rule(request: Request, number: int) -> int:
        asked = text.tokenizer.decode(request.prompt)
        at = min((found, each[0]) for each in PARAGRAPHS if (found := asked.find(each)) >= 0)
        written = [*text.tokenizer.encode(at[1].upper()), text.tokenizer.eot_id]
        return written[number]

    return rule


@pytest.fixture(scope="module")
def server(text: RunText) -> Iterator[Served]:
    options = replace(ServeOptions(NAME), mode=mode_of("translate", "tr"))
    with served(text, lambda: FakeBackend(replies(text), context=CONTEXT), options) as server:
        yield server


def ask(server: Served, content: str, **more: Any) -> httpx.Response:
    body = {"model": NAME, "messages": [{"role": "user", "content": content}]} | more
    return httpx.post(f"{server.url}/v1/chat/completions", json=body)


def test_a_long_text_is_translated_passage_by_passage(server: Served, text: RunText) -> None:
    seen = len(server.backend.seen)
    answer = ask(server, LONG, messages=[SYSTEM, {"role": "user", "content": LONG}]).json()
    requests = sorted(server.backend.seen[seen:], key=lambda each: each.sample)
    prompts = [text.tokenizer.decode(each.prompt) for each in requests]
    assert len(prompts) > 1
    assert all(prompt.startswith("<|im_start|>system Be brief.") for prompt in prompts)
    assert [each for prompt in prompts for each in PARAGRAPHS if each in prompt] == PARAGRAPHS
    firsts = [next(each[0].upper() for each in PARAGRAPHS if each in prompt) for prompt in prompts]
    assert answer["choices"][0]["message"]["content"] == "\n\n".join(firsts)
    assert answer["choices"][0]["finish_reason"] == "stop"
    note = f"the text is translated in {len(prompts)} passages, each for itself"
    assert answer["trimaran"] == {"passages": len(prompts), "note": note}
    assert answer["usage"]["prompt_tokens"] == sum(len(each.prompt) for each in requests)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompts)
    assert server.backend.most_active > 1
    server.wait_until(lambda: server.service.gate.taken == 0)

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(
            client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": LONG}], stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "\n\n".join(firsts)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-2].model_extra or {})["trimaran"]["passages"] == len(prompts)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(prompts)
    assert f"trimaran_prompt_tokens_total {server.call(lambda: server.service.metrics.prompt_tokens)}" in (
        httpx.get(f"{server.url}/metrics").text
    )


def test_what_fits_goes_as_it_did_and_earlier_turns_leave_where_they_must(server: Served, text: RunText) -> None:
    said = [{"role": "user", "content": PARAGRAPHS[0]}, {"role": "assistant", "content": "A"}]
    last = {"role": "user", "content": PARAGRAPHS[1]}
    for messages, turns in (([last], 1), ([*said, last], 2), ([*said * 6, last], 1)):
        answer = ask(server, "", messages=messages)
        prompt = text.tokenizer.decode(server.backend.seen[-1].prompt)
        assert prompt.count("Translate the following text") == turns, answer.text
    alone = "the context has no room for the messages before the text"
    assert answer.json()["trimaran"] == {"passages": 1, "note": alone}


def test_what_passages_can_not_have(server: Served) -> None:
    for change, says in (
        ({"n": 2}, "n is not for a text that goes in passages"),
        ({"logprobs": True}, "logprobs is not for a text that goes in passages"),
        ({"messages": [SYSTEM | {"content": LONG}, {"role": "user", "content": LONG}]}, "context has 520 tokens"),
    ):
        refused = ask(server, LONG, **change)
        assert refused.status_code == 400, refused.text
        assert says in refused.json()["error"]["message"]
    server.call(lambda: setattr(server.backend, "fails_with", "a passage is ill"))
    failed = ask(server, LONG)
    server.call(lambda: setattr(server.backend, "fails_with", None))
    assert failed.status_code == 500
    assert "a passage is ill" in failed.json()["error"]["message"]
    server.wait_until(lambda: server.call(lambda: server.backend.active) == 0)


def test_a_client_that_leaves_ends_its_passages(server: Served) -> None:
    server.call(server.backend.hold.clear)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": NAME, "messages": [{"role": "user", "content": LONG}]}, timeout=0.5,
        )  # fmt: skip
    server.wait_until(lambda: server.call(lambda: server.service.gate.taken + server.backend.active) == 0)
    server.call(server.backend.hold.set)


def test_a_model_without_a_template_translates_every_paragraph(tmp_path: Path) -> None:
    text = make_text(tmp_path, template=None)
    options = replace(ServeOptions(NAME), mode=mode_of("translate", "tr"))
    with served(text, lambda: FakeBackend(replies(text), context=CONTEXT), options) as server:
        both = "\n\n".join(PARAGRAPHS[:2])
        assert ask(server, both).json()["choices"][0]["message"]["content"] == "A\n\nB"
        assert ask(server, PARAGRAPHS[2]).json()["choices"][0]["message"]["content"] == "C"
