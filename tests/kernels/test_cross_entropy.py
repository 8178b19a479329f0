"""The parts of a cross entropy that is cut over the vocabulary, put together on simulated ranks, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL, combine, local_log_softmax, logits_gradient_


def on_ranks(logits: Tensor, labels: Tensor, dloss: Tensor, num_ranks: int, padding: float = 1e9) -> tuple[Tensor, Tensor]:
    """(loss [tokens], gradient of the logits [tokens, vocab]) as `num_ranks` ranks compute them; padded columns start as `padding`."""
    tokens, vocab = logits.shape
    width = -(-vocab // num_ranks)
    padded = torch.full((tokens, width * num_ranks), padding, dtype=logits.dtype)
    padded[:, :vocab] = logits
    parts = [local_log_softmax(part.clone(), labels, rank * width, vocab) for rank, part in enumerate(padded.split(width, dim=1))]
    statistics = torch.stack([part[1] for part in parts])
    gradients = []
    for rank, (log_probs, own) in enumerate(parts):
        loss, lse = combine(statistics, labels)
        gradients.append(logits_gradient_(log_probs, own[0] - lse, labels, rank * width, dloss))
    gradient = torch.cat(gradients, dim=1)
    assert not gradient[:, vocab:].any(), "padded columns have no gradient"
    return loss, gradient[:, :vocab]


def case(tokens: int, vocab: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels of which about every fifth is ignored, gradients of the losses)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORED_LABEL
    return logits, labels, torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)


def truth(logits: Tensor, labels: Tensor, dloss: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, labels, reduction="none", ignore_index=IGNORED_LABEL)
    (gradient,) = torch.autograd.grad(loss, leaf, dloss.double())
    return loss.detach(), gradient


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(0, 140), st.integers(1, 30), st.integers(1, 8), st.integers(0, 1000))
def test_loss_and_gradient_equal_torch_for_any_cut(tokens: int, vocab: int, num_ranks: int, seed: int) -> None:
    values = case(tokens, vocab, seed=seed)
    got, expected = on_ranks(*values, num_ranks), truth(*values)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("vocab", "num_ranks"), [(9, 8), (5, 4), (17, 16), (2, 8)])
def test_ranks_of_padding_alone_take_no_probability(vocab: int, num_ranks: int) -> None:
    assert -(-vocab // num_ranks) * (num_ranks - 1) >= vocab, "the last rank holds padding alone"
    values = case(33, vocab)
    for got, expected in zip(on_ranks(*values, num_ranks), truth(*values), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e300])
def test_what_stands_in_padded_columns_does_not_matter(padding: float) -> None:
    logits, labels, dloss = case(20, 10)
    clean, dirty = on_ranks(logits, labels, dloss, 4, 0.0), on_ranks(logits, labels, dloss, 4, padding)
    assert clean[0].equal(dirty[0])
    assert clean[1].equal(dirty[1])


def test_ignored_tokens_have_no_loss_and_no_gradient_whatever_reaches_them() -> None:
    logits, labels, dloss = case(40, 12)
    labels[:7] = IGNORED_LABEL
    dloss[:7] = math.nan
    loss, gradient = on_ranks(logits, labels, dloss, 3)
    assert not loss[:7].any()
    assert not gradient[:7].any()
    assert gradient[7:].isfinite().all()


def test_all_tokens_ignored() -> None:
    logits, labels, dloss = case(5, 6)
    loss, gradient = on_ranks(logits, torch.full_like(labels, IGNORED_LABEL), dloss, 2)
    assert not loss.any()
    assert not gradient.any()


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_float32_is_right_far_from_zero(num_ranks: int, shift: float) -> None:
    logits, labels, dloss = case(100, 50, torch.float32)
    logits = logits + shift
    got, expected = on_ranks(logits, labels, dloss, num_ranks), truth(logits, labels, dloss)
    # A float32 of 300 has steps of 3e-5; exp without the shift by the maximum would be 0 or inf.
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradient_is_the_slope_of_the_loss(num_ranks: int) -> None:
    logits, labels, dloss = case(4, 7)
    _, gradient = on_ranks(logits, labels, dloss, num_ranks)
    step = 1e-6
    for token in range(4):
        for column in range(7):
            up, down = logits.clone(), logits.clone()
            up[token, column] += step
            down[token, column] -= step
            slope = (on_ranks(up, labels, dloss, num_ranks)[0] - on_ranks(down, labels, dloss, num_ranks)[0]) @ dloss / (2 * step)
            assert gradient[token, column] == pytest.approx(slope.item(), abs=1e-7)


@pytest.mark.parametrize("tokens", [63, 64, 65, 130])
def test_the_backward_pass_covers_its_last_rows(tokens: int) -> None:
    values = case(tokens, 5)
    torch.testing.assert_close(on_ranks(*values, 1)[1], truth(*values)[1], rtol=0, atol=1e-12)


def test_one_rank_of_a_power_of_two_does_not_change_the_bits_of_the_plain_computation() -> None:
    logits, labels, _ = case(30, 16, torch.float32)
    log_probs, _ = local_log_softmax(logits.clone(), labels, 0, 16)
    assert log_probs.equal(logits.log_softmax(-1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("low", [-1e2, -1e5])
def test_loss_keeps_its_digits_when_the_first_column_lies_far_below_the_maximum(ranks: int, low: float) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, 4] = low
    labels = torch.tensor([1, 2, 3, 6, 7])
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    statistics = [local_log_softmax(part.clone(), labels, first, 8)[1] for part, first in zip(logits.chunk(ranks, 1), (0, 4), strict=False)]
    loss, _ = combine(torch.stack(statistics), labels)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=2e-6)
