"""Filters keep what transformers' processors of the same name keep; draws follow the probabilities that are left."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimaran.runtime.infer import sampling as ours
from trimaran.runtime.infer.sampling_params import SamplingParams

VOCAB = 301


def random_logits(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, VOCAB, generator=generator) * 4
    logits[1] = logits[1].round()  # many equal ones
    logits[2, :-3] = -torch.inf
    return logits.to(dtype)


def kept(logits: Tensor) -> Tensor:
    return logits > -torch.inf


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_filter_keeps_what_transformers_keeps(seed: int, dtype: torch.dtype) -> None:
    logits, ids = random_logits(seed, dtype), torch.zeros(7, 1, dtype=torch.int64)
    for k in (1, 2, 17, VOCAB - 1, VOCAB, VOCAB + 5):
        assert torch.equal(ours.keep_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999, 1 - 1e-7):
        assert torch.equal(ours.keep_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))
    for p in (1e-4, 0.05, 0.5, 1.0):
        assert torch.equal(ours.keep_min_p(logits, p), MinPLogitsWarper(p)(ids, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(4)
    ids = torch.randint(VOCAB, (7, 30), generator=torch.Generator().manual_seed(5))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(
        ours.penalize_repetition(logits, seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    )


def test_top_p_of_a_large_vocabulary_keeps_what_transformers_keeps() -> None:
    """Whether the likeliest tokens are enough, as in the first rows, or not."""
    logits = torch.randn(4, 9000, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    logits[:2] *= 5
    ids = torch.zeros(2, 1, dtype=torch.int64)
    for p in (1e-6, 0.3, 0.9, 0.999):
        for part in (logits[:2], logits[2:]):
            assert torch.equal(ours.keep_top_p(part, p), TopPLogitsWarper(p)(ids, part))
    assert kept(ours.keep_top_p(logits[:2], 0.9)).sum() < 1024 < kept(ours.keep_top_p(logits[2:], 0.9)).sum()


def test_presence_and_frequency_are_taken_from_the_logits_of_new_tokens() -> None:
    """OpenAI's formula: mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    logits, counts = random_logits(8, torch.float64), torch.zeros(7, VOCAB, dtype=torch.float64)
    counts[:, 5], counts[:, 9] = 1, 3
    found = ours.penalize_counts(logits, counts, 0.5, -0.25)
    expected = logits.clone()
    expected[:, 5] -= 0.5 - 0.25
    expected[:, 9] -= 0.5 - 0.75
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    greedy = SamplingParams(9, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    likeliest = ours.choose(logits, greedy, 1, None, None)
    counts = torch.zeros_like(counts).scatter_(1, likeliest[:, None], 1e9)
    assert not (ours.choose(logits, greedy, 1, None, None, counts) == likeliest).any()


def test_stop_tokens_are_forbidden_as_by_transformers() -> None:
    logits, ids = random_logits(6), torch.zeros(7, 4, dtype=torch.int64)
    theirs = MinNewTokensLengthLogitsProcessor(3, 5, [7, 9])(ids, logits)
    assert torch.equal(ours.forbid(logits, (7, 9)), theirs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 40},
        {"temperature": 0.3, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 100, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 5, "min_p": 0.3},
    ],
    ids=str,
)
def test_all_filters_together_keep_what_transformers_keeps(settings: dict[str, Any], seed: int) -> None:
    """In transformers' order (penalty, temperature, top_k, top_p, min_p) the same probabilities are left."""
    logits = random_logits(10 + seed)
    ids = torch.randint(VOCAB, (7, 30), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(settings["temperature"])]
    for name, processor in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            processors.append(processor(settings[name]))
    theirs = LogitsProcessorList(processors)(ids, logits)
    sampling = SamplingParams(1, repetition_penalty=1.2, **settings)
    found = ours.filtered(ours.penalize_repetition(logits, seen, 1.2), sampling)
    assert torch.equal(kept(found), kept(theirs))
    torch.testing.assert_close(found.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-9)


def test_a_tiny_temperature_is_no_overflow() -> None:
    logits = random_logits(7)
    found = ours.choose(
        logits, SamplingParams(1, temperature=1e-30), 0, None, torch.full((7,), 0.999, dtype=torch.float64)
    )
    unique = torch.tensor([0, 2, 3, 4, 5, 6])
    assert torch.equal(found[unique], logits.argmax(-1)[unique])


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    drawn = []
    for number in range(400):
        uniform = ours.uniforms(11, torch.tensor([0]), number, number + 1)[:, 0]
        drawn.append(int(ours.choose(logits, SamplingParams(1, top_k=2), 0, None, uniform)))
    assert set(drawn) == {1, 2}
    # P(1) = 1 / (1 + e^-1) = 0.731; 400 draws lie within 0.1 of it with overwhelming probability, and the draws are
    # fixed
    assert abs(drawn.count(1) / 400 - 0.731) < 0.1


@pytest.mark.parametrize("edge", [2.0**-33, 1 - 2.0**-33])
def test_what_is_left_out_is_never_drawn(edge: float) -> None:
    """Not even by the smallest and the largest random number, where the first and the last token are left out."""
    for seed in range(5):
        logits = random_logits(seed)
        logits[:, 0] = logits[:, -1] = -torch.inf
        logits[2] = random_logits(9)[3]
        for settings in ({"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.5}, {}):
            sampling = SamplingParams(1, **settings)  # type: ignore[arg-type]
            drawn = ours.choose(logits, sampling, 0, None, torch.full((7,), edge, dtype=torch.float64))
            assert kept(ours.filtered(logits, sampling)).gather(1, drawn[:, None]).all()


def test_random_numbers_depend_on_seed_sample_and_token_alone() -> None:
    every = ours.uniforms(3, torch.arange(5), 0, 200)
    assert torch.equal(ours.uniforms(3, torch.tensor([4, 1]), 70, 90), every[[4, 1], 70:90])
    assert not torch.equal(ours.uniforms(4, torch.arange(5), 0, 200), every)
    assert every.unique().numel() == every.numel()
    assert 0 < every.min() < every.max() < 1
    assert abs(every.mean().item() - 0.5) < 0.03


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = random_logits(8)
    logits[0, 3], logits[4, 5] = torch.nan, torch.inf
    logits[6] = -torch.inf
    for sampling, uniform in (
        (SamplingParams(1, temperature=0.0), None),
        (SamplingParams(1), torch.full((7,), 0.5, dtype=torch.float64)),
    ):
        found = ours.choose(logits, sampling, 0, None, uniform)
        assert (found == ours.NOT_FINITE).tolist() == [True, False, False, False, True, False, True]


def test_stop_tokens_wait_for_min_new_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0]])
    sampling = SamplingParams(9, temperature=0.0, min_new_tokens=2, stop_tokens=(1,))
    assert [int(ours.choose(logits, sampling, num_new, None, None)) for num_new in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, r"temperature \(-1\) must not be negative"),
        ({"temperature": float("nan")}, r"temperature \(nan\) must be a finite number"),
        ({"temperature": float("inf")}, r"temperature \(inf\) must be a finite number"),
        ({"top_k": -1}, r"top_k \(-1\) must not be negative"),
        ({"top_p": 0.0}, r"top_p \(0.0\) must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p \(1.1\) must be above 0 and at most 1"),
        ({"min_p": -0.1}, r"min_p \(-0.1\) must be from 0 to 1"),
        ({"min_p": float("nan")}, r"min_p \(nan\) must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0.0\) must be from 1e-30"),
        ({"min_new_tokens": 4}, r"min_new_tokens \(4\) must not be above max_new_tokens \(3\)"),
        ({"context": "slip"}, r"context \('slip'\) must be 'slide' or 'stop'"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(3, **settings)
