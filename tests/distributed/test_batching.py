"""Continuous batching: each token is that of `generate` for the request alone, at every layout, in whatever company."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from tests.distributed.batching_ranks import (
    CONTEXT,
    SETTINGS,
    Text,
    TimetableDesk,
    alone,
    make,
    requests,
    text_of,
    timetable,
)
from tests.distributed.ranks import RankPool
from tests.distributed.test_generate import VOCAB
from trimaran.models.parallel.parameter import info_of
from trimaran.models.transformer import Stage
from trimaran.runtime.infer.batching.messages import Event, Failed, Finished, NewToken, PromptScores, Request
from trimaran.runtime.infer.batching.orders import Cancel, Order
from trimaran.runtime.infer.batching.replica import Limits, serve
from trimaran.runtime.infer.batching.rows import Pieces, RowGroup
from trimaran.runtime.infer.generate import longest_shared

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
PIECES = Pieces(alone=64, among=7)
WARM_UP = 32 + 1  # tokens that the ranks compute before the first request


def ranks_of(parallel: dict[str, Any]) -> int:
    return int(parallel.get("tp", 1) * parallel.get("pp", 1) * parallel.get("dp", 1))


def each_alone(model: dict[str, Any]) -> list[Text]:
    spec, mesh, stages = make({}, model)
    return [alone(spec, mesh, stages, each) for each in requests()]


def together(parallel: dict[str, Any], model: dict[str, Any], slots: int = 4) -> list[list[Event]]:
    """The events of each request, on the leader of each dp replica; [] on other ranks."""
    spec, mesh, stages = make(parallel, model)
    desk = TimetableDesk(timetable(requests()))
    serve(stages, mesh, spec, Limits(slots, CONTEXT, replace(PIECES, shared=longest_shared(spec.transformer))), desk)
    # A leader that has nothing to do sends its ranks a sign of life in time.
    assert desk.longest_wait_s < spec.launcher.timeout_s / 2
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
    return {name: ranks.alone(each_alone, model) for name, model in MODELS.items()}


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


def conversation(parallel: dict[str, Any], model: dict[str, Any]) -> list[tuple[Request, int, list[int], int]]:
    """Turns of two conversations, alternately: the request, its cached tokens, the answer, and the tokens computed."""
    spec, mesh, stages = make(parallel, model)
    settings = replace(SETTINGS["drawn"], max_new_tokens=6)
    computed, texts = _counted(stages), [list(range(1, 13)), list(range(50, 58))]
    asked: list[Request] = []
    starts: list[int] = []

    def ask(number: int, turn: int) -> Request:
        asked.append(Request(10 * number + turn, tuple(texts[number]), settings, sample=number))
        return asked[-1]

    def watch(desk: TimetableDesk, events: list[Event]) -> Sequence[Order]:
        orders = []
        for event in events:
            number, turn = divmod(event.request, 10)
            if isinstance(event, NewToken):
                texts[number].append(event.token)
            elif isinstance(event, Finished):
                starts.append(computed[0])
                texts[number] += [7 + turn, 9]
                if turn < 2:
                    orders.append(ask(1, turn) if number == 0 else ask(0, turn + 1))
        return orders

    desk = TimetableDesk([(0, ask(0, 0))], watch)
    serve(stages, mesh, spec, Limits(2 * mesh.pp.size, CONTEXT), desk)
    mesh.close()
    found = []
    for request, start, stop in zip(asked, [WARM_UP, *starts], starts, strict=False):
        first, *events = desk.answers[request.id]
        assert isinstance(first, PromptScores)
        tokens = [each.token for each in events if isinstance(each, NewToken)]
        found.append((request, first.cached, tokens, stop - start))
    return found


def answers_alone(model: dict[str, Any], wanted: list[Request]) -> list[list[int]]:
    spec, mesh, stages = make({}, model)
    return [alone(spec, mesh, stages, each)[0] for each in wanted]


def _counted(stages: dict[int, Stage]) -> list[int]:
    """Count the tokens that the stages compute from here on."""
    computed = [0]
    for stage in stages.values():
        extend = stage.extend

        def counting(hidden: Any, tokens: torch.Tensor, cache: Any, extend: Any = extend) -> torch.Tensor:
            computed[0] += tokens.numel()
            out: torch.Tensor = extend(hidden, tokens, cache)
            return out

        stage.extend = counting  # type: ignore[method-assign]
    return computed


@pytest.mark.parametrize("model", ["rotary", "alibi-window", "dynamic-ntk"])
def test_a_second_turn_computes_its_new_tokens_alone_and_says_the_same(model: str, ranks: RankPool) -> None:
    (found,) = ranks.run(conversation, 1, {}, MODELS[model])
    assert [cached for _, cached, _, _ in found] == [0, 0, 17, 13, 0 if model == "dynamic-ntk" else 25]
    for request, cached, _, computed in found:
        assert computed == len(request.prompt) - cached + 5  # the last of the six new tokens is not read
    fresh = ranks.run(answers_alone, 1, MODELS[model], [request for request, *_ in found])[0]
    assert [tokens for _, _, tokens, _ in found] == fresh


def test_conversations_at_pp2_find_their_rows_again(ranks: RankPool) -> None:
    found = ranks.run(conversation, 2, {"pp": 2}, {})[0]
    assert [cached for _, cached, _, _ in found] == [0, 0, 17, 13, 25]
    fresh = ranks.run(answers_alone, 1, {}, [request for request, *_ in found])[0]
    assert [tokens for _, _, tokens, _ in found] == fresh


def beginnings() -> tuple[list[list[int]], list[list[int]], list[int], int]:
    """Eight choices of one prompt that come together, and two other prompts that begin alike."""
    spec, mesh, stages = make({})
    computed = _counted(stages)
    prompt = tuple(range(30, 60))
    wanted = [Request(n, prompt, replace(SETTINGS["drawn"], max_new_tokens=5), sample=n) for n in range(8)]
    wanted += [Request(8 + n, (*prompt[:25], 1 + n), SETTINGS["greedy"]) for n in range(2)]
    desk = TimetableDesk([(0, each) for each in wanted])
    serve(stages, mesh, spec, Limits(10, CONTEXT), desk)
    total, firsts = computed[0], [desk.answers[each.id][0] for each in wanted]
    found = [text_of(desk.answers[each.id])[0] for each in wanted]
    expected = [alone(spec, mesh, stages, each)[0] for each in wanted]
    mesh.close()
    return found, expected, [each.cached for each in firsts if isinstance(each, PromptScores)], total


def test_a_common_beginning_is_copied_from_a_text_that_goes_on(ranks: RankPool) -> None:
    ((found, expected, cached, total),) = ranks.run(beginnings, 1)
    assert found == expected
    assert len({tuple(each) for each in found[:8]}) == 8
    assert cached == [0] + [29] * 7 + [25] * 2
    assert total == WARM_UP + 30 + 7 + 2 * 1 + 8 * 4 + 2 * 11


def test_the_only_row_keeps_a_short_common_beginning() -> None:
    """A twin's turn has the system message in common with the turn before, and other passages after it."""
    group = RowGroup(1, CONTEXT, cast("Any", None), Pieces(8, 8), [])  # joining touches no memory
    (row,) = group.rows
    for number, (prompt, expected) in enumerate([(range(30), 0), ([*range(5), *range(40, 60)], 5)]):
        group.join(Request(number, tuple(prompt), SETTINGS["greedy"]))
        assert row.cached == row.reused == expected
        row.cached = len(row.tokens)
        group.cancel(number)


def scored() -> tuple[list[list[Event]], list[list[float]], list[list[list[tuple[int, float]]]]]:
    """The scores of prompts, in pieces, while another text goes on; and what whole sequences say."""
    spec, mesh, stages = make({})
    other = Request(9, (4, 5, 6), replace(SETTINGS["greedy"], max_new_tokens=30))
    prompts = [tuple(range(2, 40)), (5,), tuple(range(2, 32)), (8, 9)]
    news = [0, 0, 3, 0]
    wanted = [
        Request(n, prompt, replace(SETTINGS["greedy"], max_new_tokens=new), top_logprobs=k, scores_prompt=n != 3)
        for n, (prompt, new, k) in enumerate(zip(prompts, news, (2, 0, 1, None), strict=True))
    ]
    desk = TimetableDesk([(0, other), *((3 + 4 * each.id, each) for each in wanted)])
    serve(stages, mesh, spec, Limits(3, CONTEXT, PIECES), desk)
    logs, tops = [], []
    for request in wanted[:3]:
        tokens = torch.tensor([request.prompt])
        found = stages[0].logits(stages[0].run_layers(None, tokens))[0, :-1, :VOCAB].log_softmax(-1)
        logs.append(found.gather(1, tokens[0, 1:, None]).flatten().tolist())
        best = found.topk(request.top_logprobs or 0)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops.append([list(zip(*pair, strict=True)) for pair in pairs])
    mesh.close()
    return [desk.answers[each.id] for each in wanted], logs, tops


def test_a_prompt_is_scored_as_whole_sequences_are(ranks: RankPool) -> None:
    ((answers, logs, tops),) = ranks.run(scored, 1)
    for events, expected, best in zip(answers[:3], logs, tops, strict=True):
        assert isinstance(events[0], PromptScores)
        assert events[0].cached == 0
        torch.testing.assert_close(list(events[0].logprobs), expected, rtol=0, atol=1e-9)
        assert [[token for token, _ in each] for each in events[0].top] == [
            [token for token, _ in each] for each in best
        ]
    assert [len(events) for events in answers] == [2, 2, 5, 2]
    assert isinstance(answers[3][1], Finished)


def cancelled() -> tuple[list[Event], list[str], int]:
    """One slot: a text is cancelled at its third token, and the next one takes its place."""
    spec, mesh, stages = make({})
    long = replace(SETTINGS["greedy"], max_new_tokens=40)
    wanted = [Request(n, (5 + n, 6), long) for n in range(3)]
    order: list[str] = []

    def watch(desk: TimetableDesk, events: list[Event]) -> Sequence[Order]:
        order.extend(f"{type(each).__name__} {each.request}" for each in events)
        return [Cancel(0)] if order.count("NewToken 0") == 3 and "NewToken 1" not in order else []

    desk = TimetableDesk([(0, each) for each in wanted] + [(4, Cancel(2)), (4, Cancel(77))], watch)
    computed = _counted(stages)
    serve(stages, mesh, spec, Limits(1, CONTEXT), desk)
    mesh.close()
    return desk.answers[1], order, computed[0]


def test_a_cancelled_text_frees_its_place_within_a_token(ranks: RankPool) -> None:
    ((answer, order, computed),) = ranks.run(cancelled, 1)
    assert order[:5] == ["PromptScores 0", *["NewToken 0"] * 3, "PromptScores 1"]
    assert len(text_of(answer)[0]) == 40
    assert not [each for each in order if each.endswith(" 2")]  # it waited when it was cancelled
    assert computed == WARM_UP + (2 + 2) + (2 + 39)


def poisoned(parallel: dict[str, Any]) -> list[tuple[list[Event], list[int]]]:
    """A request whose logits are not finite among others, with a row for each and with fewer."""
    spec, mesh, stages = make(parallel)
    bad = 200
    wanted = [Request(n, (3 + n, *([bad] if n in (1, 4) else []), 7), SETTINGS["long"]) for n in range(6)]
    wanted = [replace(each, sampling=replace(each.sampling, stop_tokens=(), max_new_tokens=15)) for each in wanted]
    with torch.no_grad():
        if 0 in stages:
            first = stages[0].embedding.weight
            local = bad - info_of(first).shard.offset
            if 0 <= local < len(first):
                first[local] = torch.nan
    found = []
    for slots in (2, 6):
        desk = TimetableDesk([(each.id, each) for each in wanted])
        serve(stages, mesh, spec, Limits(slots, CONTEXT), desk)
        found.append([desk.answers.get(each.id, []) for each in wanted])
    expected = [alone(spec, mesh, stages, each)[0] if each.id not in (1, 4) else [] for each in wanted]
    mesh.close()
    return [(each[n], expected[n]) for each in found for n in range(6)] if found[0][0] else []


@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"pp": 2}], ids=["one", "tp2", "pp2"])
def test_logits_that_are_not_finite_fail_their_own_request_alone(parallel: dict[str, Any], ranks: RankPool) -> None:
    for number, (events, expected) in enumerate(ranks.run(poisoned, ranks_of(parallel), parallel)[0]):
        if number % 6 in (1, 4):
            assert [type(each) for each in events] == [Failed]
            assert isinstance(events[0], Failed)
            assert "new token 1 are not finite" in events[0].message
        else:
            assert text_of(events)[0] == expected


def refused() -> list[list[Event]]:
    spec, mesh, stages = make({})
    greedy = SETTINGS["greedy"]
    wanted = [
        Request(0, (), greedy),
        Request(1, (VOCAB,), greedy),
        Request(2, (1,) * (CONTEXT + 1), greedy),
        Request(3, (1,), replace(greedy, context="slide")),
        Request(4, (1,), replace(greedy, stop_tokens=(VOCAB,))),
        Request(5, (1,), greedy, top_logprobs=VOCAB + 1),
        Request(6, (1,) * CONTEXT, greedy),
        Request(7, (1,), replace(greedy, max_new_tokens=0)),
    ]
    desk = TimetableDesk([(0, each) for each in wanted])
    serve(stages, mesh, spec, Limits(2, CONTEXT), desk)
    mesh.close()
    return [desk.answers[each.id] for each in wanted]


def test_what_can_not_be_served_is_told_in_a_sentence(ranks: RankPool) -> None:
    (answers,) = ranks.run(refused, 1)
    words = ["no tokens", "token 263", "49 tokens, more than the 48", "must be stop", "stop token 263", "at most 263"]
    for events, expected in zip(answers, words, strict=False):
        assert [type(each) for each in events] == [Failed]
        assert expected in getattr(events[0], "message", "")
    assert [type(each).__name__ for each in answers[6]] == ["PromptScores", "NewToken", "Finished"]
    assert text_of(answers[6])[1] == "context"
    assert text_of(answers[7])[:2] == ([], "length")


def comers() -> tuple[list[Request], list[tuple[int, Order]]]:
    """500 requests at random times, and the timetable in which a third of them are cancelled."""
    generator = torch.Generator().manual_seed(3)
    wanted, table = [], []
    for number, row in enumerate(torch.randint(1, 1000, (500, 6), generator=generator).tolist()):
        setting = replace(SETTINGS[list(SETTINGS)[row[4] % 6]], max_new_tokens=1 + row[3] % 9, min_new_tokens=0)
        prompt = tuple(value % VOCAB for value in row[: 1 + row[5] % 5])
        wanted.append(Request(number, prompt, setting, sample=number))
        table.append((number // 2, wanted[-1]))
        if row[1] % 3 == 0:
            table.append((number // 2 + row[0] % 12, Cancel(number)))
    return wanted, sorted(table, key=lambda each: each[0])


def many(parallel: dict[str, Any]) -> tuple[dict[int, list[Event]], list[bool], int]:
    """The events of `comers`, whether each group of rows is idle at the end, and how many requests are still held."""
    spec, mesh, stages = make(parallel)
    desk = TimetableDesk(comers()[1])
    groups: list[RowGroup] = []
    make_group = RowGroup.__init__

    def kept(self: RowGroup, *arguments: Any) -> None:
        groups.append(self)
        make_group(self, *arguments)

    RowGroup.__init__ = kept  # type: ignore[method-assign,assignment]
    try:
        serve(stages, mesh, spec, Limits(6, CONTEXT), desk)
    finally:
        RowGroup.__init__ = make_group  # type: ignore[method-assign]
    idle, answers = [group.is_idle for group in groups], desk.answers
    gc.collect()
    held = sum(isinstance(each, Request) for each in gc.get_objects())
    mesh.close()
    return answers, idle, held


@pytest.mark.parametrize("parallel", [{}, {"pp": 2}], ids=["one", "pp2"])
def test_five_hundred_requests_that_come_and_go_leave_nothing(parallel: dict[str, Any], ranks: RankPool) -> None:
    answers, idle, held = ranks.run(many, ranks_of(parallel), parallel)[0]
    wanted, table = comers()
    cancelled = {order.request for _, order in table if isinstance(order, Cancel)}
    rest = [each for each in wanted if each.id not in cancelled]
    assert 100 < len(cancelled) < 200
    assert {type(answers[each.id][-1]) for each in rest} == {Finished}
    some = rest[::20]
    assert [text_of(answers[each.id])[0] for each in some] == ranks.run(answers_alone, 1, {}, some)[0]
    assert idle
    assert all(idle)
    assert held == 0
