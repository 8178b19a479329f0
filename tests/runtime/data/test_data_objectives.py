"""Samples: a fixed number of predicted tokens in the published shares, the same at every layout and after a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.runtime.data.test_data_loader import SEQ_LEN, make_shards
from trimaran.models.batch import Microbatch
from trimaran.runtime.data.permutation import position_draws
from trimaran.runtime.data.samples.loader import Loader
from trimaran.runtime.data.samples.objectives import MaskedTokens, Objective, PermutedTokens

SEQ, VOCAB, MASK, END = 512, 1000, 3, 0
MASKED = MaskedTokens(seed=7, num_predicted=77, mask_id=MASK, eot_id=END, vocab_size=VOCAB)
PERMUTED = PermutedTokens(seed=7, num_predicted=85, eot_id=END)


def spans(samples: int, ends: tuple[int, ...] = ()) -> np.ndarray:  # type: ignore[type-arg]
    found = np.random.default_rng(0).integers(4, VOCAB, (samples, SEQ + 1))
    found[:, list(ends)] = END
    return found


def made(
    objective: Objective,
    tokens: np.ndarray,  # type: ignore[type-arg]
    first: int = 0,
) -> tuple[Microbatch, Tensor]:
    batch = objective.microbatch(tokens, np.arange(first, first + len(tokens)))
    assert batch.targets is not None
    return batch, batch.targets


def test_of_the_chosen_tokens_80_percent_are_hidden_10_random_and_10_kept() -> None:
    tokens = spans(200)
    batch, targets = made(MASKED, tokens)
    shown = batch.tokens.gather(1, targets)
    assert targets.shape == batch.labels.shape == (200, 77)
    assert torch.equal(batch.labels, torch.from_numpy(tokens[:, :-1]).gather(1, targets))
    hidden, kept = shown == MASK, shown == batch.labels
    # 15,400 draws: a standard error of 0.3%; of the random tokens one in a thousand is the same again.
    assert hidden.double().mean().item() == pytest.approx(0.8, abs=0.015)
    assert kept.double().mean().item() == pytest.approx(0.1, abs=0.012)
    assert (~hidden & ~kept).double().mean().item() == pytest.approx(0.1, abs=0.012)
    replaced = shown[~hidden & ~kept]
    assert (replaced.min() < 0.02 * VOCAB) & (replaced.max() > 0.98 * VOCAB)


@pytest.mark.parametrize("objective", [MASKED, PERMUTED], ids=["masked", "permuted"])
def test_positions_are_distinct_and_every_one_is_as_likely(objective: Objective) -> None:
    tokens = spans(600)
    batch, targets = made(objective, tokens)
    chosen = torch.zeros(600, SEQ, dtype=torch.bool).scatter(1, targets, True)
    assert (chosen.sum(1) == targets.shape[1]).all()
    assert torch.equal(batch.tokens[~chosen], torch.from_numpy(tokens[:, :-1].copy())[~chosen])
    share = targets.shape[1] / SEQ
    counts = chosen.double().mean(0)
    assert counts.std().item() == pytest.approx((share * (1 - share) / 600) ** 0.5, rel=0.15)
    # Samples choose independently of each other.
    together = (chosen[:-1] & chosen[1:]).double().mean().item()
    assert together == pytest.approx(share**2, rel=0.1)


def test_a_permuted_sample_is_read_as_it_is_and_predicted_in_random_order() -> None:
    tokens = spans(300)
    batch, targets = made(PERMUTED, tokens)
    assert np.array_equal(batch.tokens.numpy(), tokens[:, :-1])
    ascending = (targets[:, 1:] > targets[:, :-1]).double().mean().item()
    assert ascending == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("objective", [MASKED, PERMUTED], ids=["masked", "permuted"])
def test_ends_of_documents_are_chosen_last(objective: Objective) -> None:
    few, _ = made(objective, spans(50, ends=(5, 100, 511)))
    assert not (few.labels == END).any()
    count = few.labels.shape[1]
    most, _ = made(objective, spans(5, ends=tuple(range(SEQ - count + 1))))
    assert ((most.labels == END).sum(1) == 1).all()


@pytest.mark.parametrize("objective", [MASKED, PERMUTED], ids=["masked", "permuted"])
def test_a_sample_is_the_same_in_whatever_microbatch_it_comes(objective: Objective) -> None:
    tokens = spans(8)
    whole, targets = made(objective, tokens, first=40)
    part, part_targets = made(objective, tokens[3:5], first=43)
    assert torch.equal(part.tokens, whole.tokens[3:5])
    assert torch.equal(part_targets, targets[3:5])
    other, other_targets = made(objective, tokens[3:5], first=44)
    assert not torch.equal(other_targets, part_targets)
    assert other.first_sample == 44


def test_the_loader_hides_the_same_tokens_at_any_dp_size_and_others_in_the_next_epoch(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 8 * SEQ_LEN + 1)
    objective = MaskedTokens(seed=1, num_predicted=2, mask_id=90, eot_id=91, vocab_size=92)

    def batches(dp_rank: int, dp_size: int, consumed: int = 0) -> list[Microbatch]:
        sizes = {"seq_len": SEQ_LEN, "global_batch_size": 8, "micro_batch_size": 2}
        loader = Loader(shards, **sizes, dp_rank=dp_rank, dp_size=dp_size, seed=1, objective=objective)
        return loader.microbatches(consumed)

    def joined(found: list[Microbatch]) -> Tensor:
        return torch.cat([torch.cat((batch.tokens, batch.labels), dim=1) for batch in found])

    assert torch.equal(joined(batches(0, 1)), joined(batches(0, 2) + batches(1, 2)))
    assert torch.equal(joined(batches(0, 1)), joined(batches(0, 1)))
    first, second = ({int(b) for batch in batches(0, 1, at) for b in batch.labels.flatten()} for at in (0, 8))
    assert first != second


def test_hashes_of_another_purpose_seed_or_sample_differ() -> None:
    samples = np.array([0, 1, 2**40])
    draws = [position_draws(samples, 6, seed, purpose) for seed, purpose in ((1, 0), (1, 1), (2, 0))]
    assert len({int(value) for found in draws for value in found.flatten()}) == 3 * 3 * 6
