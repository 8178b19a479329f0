"""Requests become a prefix tree and packed batches: each target once, after exactly its context, within the budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.runtime.evaluate.engine.batches import UNIT_TOKENS, LikelihoodBatch, Limits, batches, divide, inputs_of
from trimaran.runtime.evaluate.engine.exchange import (
    decode_likelihoods,
    decode_scores,
    encode_likelihoods,
    encode_scores,
    score_of,
)
from trimaran.runtime.evaluate.engine.requests import Likelihood

_TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
_LONG = st.builds(lambda token, length: (token,) * length, st.integers(0, 1), st.integers(UNIT_TOKENS, UNIT_TOKENS + 9))


@st.composite
def requests_with_common_beginnings(draw: st.DrawFn) -> list[Likelihood]:
    shots = draw(st.lists(_TOKENS | _LONG, min_size=1, max_size=2))
    made = []
    for shot in shots:
        for question in draw(st.lists(_TOKENS, max_size=4)):
            made += [Likelihood(shot + question, choice) for choice in draw(st.lists(_TOKENS, max_size=3))]
    return draw(st.permutations(made))


_LIMITS = st.builds(
    Limits,
    tokens=st.sampled_from([1, 5, 40, 300, 10_000]),
    sequences=st.sampled_from([None, 1, 2, 7]),
    shares=st.booleans(),
    longest_shared=st.sampled_from([None, 12]),
)


def read_back(made: list[LikelihoodBatch]) -> dict[tuple[int, int], tuple[int, tuple[int, ...]]]:
    """What is scored, by request and index: the token, and the tokens that the row which predicts it attends to.

    Follows the units as the attention does; the positions of those tokens must be 0, 1, 2 and so on.
    """
    kept: dict[int, tuple[int, ...]] = {}
    found = {}
    for batch in made:
        packing = batch.packing
        seen: list[tuple[int, ...]] = []
        for unit in packing.units:
            before = () if unit.prefix is None else kept[unit.prefix]
            assert len(seen) == unit.start, "units lie one behind the other"
            for row in range(unit.start, unit.stop):
                own = [other for other in range(unit.start, row + 1) if row < packing.ends[other]]
                assert not unit.is_chain or own == list(range(unit.start, row + 1))
                assert [packing.positions[other] for other in own] == list(range(len(before), len(before) + len(own)))
                seen.append(before + tuple(packing.tokens[other] for other in own))
            if unit.keeps is not None:
                assert unit.keeps not in kept
                kept[unit.keeps] = seen[-1]
        assert len(seen) == len(packing.tokens)
        assert packing.longest == max(map(len, seen))
        for target in batch.targets:
            assert (target.request, target.index) not in found
            found[target.request, target.index] = target.token, seen[target.row]
        assert [target.row for target in batch.targets] == sorted(target.row for target in batch.targets)
        for number in packing.drops:
            del kept[number]
    assert not kept, "what is kept is dropped"
    return found


@settings(deadline=None, max_examples=80)
@given(requests_with_common_beginnings(), _LIMITS)
def test_each_target_is_scored_once_after_its_context(requests: list[Likelihood], limits: Limits) -> None:
    made = list(batches(requests, limits, first=100))
    expected = {
        (100 + number, index): (token, (*request.context, *request.continuation[:index]))
        for number, request in enumerate(requests)
        for index, token in enumerate(request.continuation)
    }
    assert read_back(made) == expected
    longest = max((len(inputs_of(request)) for request in requests), default=0)
    for batch in made:
        units, size = batch.packing.units, len(batch.packing.tokens)
        assert size <= limits.tokens or (len(units) == 1 and units[0].is_chain and size <= longest)
        ends = {(target.request) for target in batch.targets}
        sequences = {inputs_of(requests[number - 100]) for number in ends}
        assert limits.longest_shared is None or batch.packing.longest <= limits.longest_shared or len(sequences) == 1


@settings(deadline=None, max_examples=30)
@given(requests_with_common_beginnings(), st.integers(1, 9))
def test_jobs_have_each_request_once_and_travel_as_bytes(requests: list[Likelihood], num_parts: int) -> None:
    parts = divide(requests, num_parts)
    assert sorted(number for part in parts for number in part) == list(range(len(requests)))
    for part in parts:
        job = [requests[number] for number in part]
        assert decode_likelihoods(encode_likelihoods(job)) == job
        scores = [score_of([-0.1] * len(each.continuation), len(each.context) % 2 == 0) for each in job]
        assert decode_scores(encode_scores(scores), job) == scores


def test_common_tokens_are_computed_once() -> None:
    shots, question = tuple(range(1000, 1400)), (1, 2, 3, 4, 5)
    questions = [Likelihood((*shots, number, *question), (choice,)) for number in range(50) for choice in range(4)]
    made = list(batches(questions, Limits(100)))
    assert sum(len(batch.packing.tokens) for batch in made) == 400 + 50 * 6
    assert max(len(batch.packing.tokens) for batch in made[1:]) <= 100
    assert (
        len(list(batches(questions, Limits(10_000, sequences=1)))) == 50
    )  # the shots share the batch of the first question
