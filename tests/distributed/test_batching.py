"""Continuous batching: each token is that of `generate` for the request alone, at every layout, in whatever company."""

from typing import Any

import pytest
import torch

from tests.distributed.batching_ranks import (
    CONTEXT,
    Text,
    TimetableDesk,
    alone,
    make,
    requests,
    text_of,
    timetable,
)
from tests.distributed.ranks import RankPool
from trimaran.runtime.infer.batching.messages import Event, NewToken
from trimaran.runtime.infer.batching.replica import Limits, serve
from trimaran.runtime.infer.batching.rows import Pieces

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned-tied": {
        "position": "learned",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    "alibi-window": {"position": "alibi", "attention_window": 3, "attention_pattern": ["full", "window"]},
    "dynamic-ntk": {"rotary_scaling": {"kind": "dynamic_ntk", "factor": 4.0, "original_max_position": 24}},
}
LIMITS = Limits(4, CONTEXT, Pieces(alone=64, among=7))


def ranks_of(parallel: dict[str, Any]) -> int:
    return int(parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1))


def each_alone(model: dict[str, Any]) -> list[Text]:
    spec, mesh, stages = make({}, model)
    return [alone(spec, mesh, stages, each) for each in requests()]


def together(parallel: dict[str, Any], model: dict[str, Any], slots: int = 4) -> list[list[Event]]:
    """The events of each request, on the leader of each dp replica; [] on other ranks."""
    spec, mesh, stages = make(parallel, model)
    desk = TimetableDesk(timetable(requests()))
    pieces = LIMITS.pieces if "rotary_scaling" not in model else Pieces(64, 7, 24)
    serve(stages, mesh, spec, Limits(slots, CONTEXT, pieces), desk)
    mesh.close()
    return [desk.answers[each.id] for each in requests()] if desk.answers else []


def check(found: list[list[Event]], expected: list[Text]) -> None:
    assert len(found) == len(expected)
    for request, events, (tokens, finish, log_probs) in zip(requests(), found, expected, strict=True):
        assert text_of(events)[:2] == (tokens, finish)
        if request.top_logprobs is not None:
            torch.testing.assert_close(text_of(events)[2], log_probs, rtol=0, atol=1e-9)
        for event in events:
            if isinstance(event, NewToken) and request.top_logprobs is not None:
                logs = [value for _, value in event.top]
                assert len(logs) == request.top_logprobs
                assert logs == sorted(logs, reverse=True)
                assert event.logprob is not None
                assert not logs or event.logprob <= logs[0]


@pytest.fixture(scope="module")
def expected(ranks: RankPool) -> dict[str, list[Text]]:
    """What `generate` gives for each request alone, by model."""
    return {name: ranks.run(each_alone, 1, model)[0] for name, model in MODELS.items()}


@pytest.mark.parametrize("model", MODELS)
def test_requests_that_join_and_leave_get_the_tokens_that_they_get_alone(
    model: str, expected: dict[str, list[Text]], ranks: RankPool
) -> None:
    assert {finish for _, finish, _ in expected[model]} >= {"length", "context"}
    assert model == "dynamic-ntk" or any(finish == "stop_token" for _, finish, _ in expected[model])
    for slots in (1, 4, 12):
        check(ranks.run(together, 1, {}, MODELS[model], slots)[0], expected[model])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_token(layout: str, expected: dict[str, list[Text]], ranks: RankPool) -> None:
    parallel = LAYOUTS[layout]
    for model in ("rotary", "learned-tied") if layout in ("tp2", "pp2") else ("rotary",):
        found = [each for each in ranks.run(together, ranks_of(parallel), parallel, MODELS[model]) if each]
        assert len(found) == parallel.get("dp", 1)
        for each in found:
            check(each, expected[model])
