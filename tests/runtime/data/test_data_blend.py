"""A blend of corpora follows its weights at every prefix, as a pure function of the sample's number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.runtime.data.samples.blend import Blend, Stage, chairmen, whole_counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any))
def test_every_prefix_follows_the_weights(counts: list[int]) -> None:
    order = chairmen(counts)
    active = sum(count > 0 for count in counts)
    bound = 1 - 1 / (2 * active - 2) if active > 1 else 0
    for index, count in enumerate(counts):
        had = np.cumsum(order == index)
        due = np.arange(1, len(order) + 1) * count / sum(counts)
        assert np.abs(had - due).max() <= bound + 1e-9
        assert had[-1] == count


def test_weights_are_whole_numbers_as_written() -> None:
    assert whole_counts([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert whole_counts([3.0, 0.0, 1.5]) == [2, 0, 1]
    assert whole_counts([1e-9, 1.0]) == [1, (1 << 20)]
    assert sum(whole_counts([0.123456789, 0.987654321])) == pytest.approx(1 << 20, abs=2)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_samples_are_counted_once_and_in_order(data: st.DataObject) -> None:
    corpora = data.draw(st.integers(1, 4))
    weights = st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])] * corpora).filter(any)
    firsts = [0, *sorted(data.draw(st.sets(st.integers(1, 300), max_size=3)))]
    blend = Blend([Stage(first, data.draw(weights)) for first in firsts])
    samples = np.arange(500, dtype=np.int64)
    which, places = blend.at(samples)
    for corpus in range(corpora):
        assert (places[which == corpus] == np.arange((which == corpus).sum())).all(), "none twice and none left out"
    for k in (0, 1, 77, 300, 500):
        assert blend.count_before(k).tolist() == [(which[:k] == corpus).sum() for corpus in range(corpora)]
    shuffled = np.random.default_rng(1).permutation(samples)
    assert (blend.at(shuffled)[0] == which[shuffled]).all(), "a function of the number alone"
    assert (blend.at(shuffled)[1] == places[shuffled]).all()


def test_stages_begin_at_their_tokens() -> None:
    blend = Blend.of({"web": 1.0, "books": 1.0}, [(0, {"web": 1.0}), (1000, {"books": 2.0})], seq_len=128)
    which, _ = blend.at(np.arange(20, dtype=np.int64))
    assert which.tolist() == [0] * 8 + [1] * 12, "sample 8 begins at token 1,024"
