"""Whatever a body holds, it becomes a plan that the backend can follow, or an error of OpenAI's form that says why."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.launchers.serve.answers import Plan, Planner
from trimaran.launchers.serve.errors import ApiError
from trimaran.launchers.serve.openai import ChatRequest, CompletionRequest, parse_request
from trimaran.runtime.infer.prompts import RunText

CONTEXT, MOST = 60, 8
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["user", "text", "ab"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PARTS = st.lists(st.fixed_dictionaries({"type": LEAVES, "text": LEAVES}))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | LEAVES},
        optional={
            "content": st.text(max_size=30)
            | st.lists(st.fixed_dictionaries({"type": LEAVES, "text": LEAVES}))
            | VALUES,
            "name": VALUES,
            "tool_calls": VALUES,
        },
    ),
    max_size=3,
)
PROMPTS = st.text() | st.lists(st.integers(-1, 320), max_size=70) | st.lists(st.text(), max_size=9) | VALUES
NUMBERS = st.integers(-3, 70) | st.floats(-3, 3) | VALUES
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "response_format", "user", "xyz"})


def planned(planner: Planner, body: dict[str, Any], record: Any) -> Plan | ApiError:
    try:
        request = parse_request(json.dumps(body).encode(), record)
        return planner.chat(request) if isinstance(request, ChatRequest) else planner.completion(request)
    except ApiError as error:
        return error


@pytest.mark.parametrize("record", [ChatRequest, CompletionRequest])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_body_is_planned_or_refused(text: RunText, record: Any, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(FIELDS), max_size=4, unique=True))
    body: dict[str, Any] = {name: data.draw(NUMBERS) for name in names}
    required = {"messages": MESSAGES} if record is ChatRequest else {"prompt": PROMPTS}
    body |= {name: data.draw(values) for name, values in required.items()} | {"model": "tiny"}
    plan = planned(Planner(text, CONTEXT, MOST), body, record)
    if isinstance(plan, ApiError):
        assert plan.status == 400
        assert plan.message
        assert json.loads(plan.body())["error"]["type"] == "invalid_request_error"
        return
    assert 0 < len(plan.requests) <= MOST
    assert len({each.id for each in plan.requests}) == len(plan.requests) == len(plan.echoes)
    for each in plan.requests:
        assert 0 < len(each.prompt) < CONTEXT
        assert all(0 <= token < text.tokenizer.vocab_size for token in each.prompt)
        assert len(each.prompt) + each.sampling.max_new_tokens <= CONTEXT


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_request(body, ChatRequest)
    assert json.loads(refused.value.body())["error"]["message"]
