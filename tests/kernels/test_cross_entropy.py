"""Cross entropy cut over the vocabulary, combined from simulated ranks, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimaran.kernels.cross_entropy import IGNORED_LABEL, combine, local_statistics_, logits_gradient_


def on_ranks(
    logits: Tensor,
    labels: Tensor,
    num_ranks: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    padding: float = 1e9,
) -> tuple[Tensor, Tensor]:
    """Return (loss [tokens], gradient of their sum [tokens, vocab]) of all ranks; padded columns hold `padding`."""
    tokens, vocab = logits.shape
    width = -(-vocab // num_ranks)
    padded = torch.full((tokens, width * num_ranks + 3), padding, dtype=logits.dtype)
    padded[:, :vocab] = logits
    parts = [padded[:, rank * width : (rank + 1) * width + 3].clone() for rank in range(num_ranks)]
    reals = [max(0, min(width, vocab - rank * width)) for rank in range(num_ranks)]
    statistics = [
        local_statistics_(part, labels, rank * width, real, label_smoothing > 0)
        for rank, (part, real) in enumerate(zip(parts, reals, strict=True))
    ]
    loss, normalizer = combine(torch.stack(statistics), labels, vocab, label_smoothing, z_loss)
    gradients = []
    for rank, (part, real) in enumerate(zip(parts, reals, strict=True)):
        where = (labels, rank * width, real)
        gradient = logits_gradient_(part, *where, statistics[rank], normalizer, vocab, label_smoothing, z_loss)
        assert gradient.data_ptr() == part.data_ptr(), "in place"
        assert not gradient[:, real:].any(), "padded columns have no gradient"
        gradients.append(gradient[:, :real])
    return loss, torch.cat(gradients, dim=1)


def case(tokens: int, vocab: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(logits, labels of which about every fifth is ignored)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = IGNORED_LABEL
    return logits, labels


def truth(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss [tokens], gradient of their sum) by torch's cross entropy and, for the z-loss, by autograd."""
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, labels, reduction="none", ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing)
    loss = loss + z_loss * leaf.logsumexp(-1).square() * (labels != IGNORED_LABEL)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], atol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


@settings(max_examples=80, derandomize=True)
@given(
    st.integers(0, 140),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 1e-2]),
)
def test_loss_and_gradient_equal_torch_for_any_cut(
    tokens: int, vocab: int, num_ranks: int, seed: int, smoothing: float, z_loss: float
) -> None:
    values = case(tokens, vocab, seed=seed)
    assert_close(on_ranks(*values, num_ranks, smoothing, z_loss), truth(*values, smoothing, z_loss), 1e-12)


@pytest.mark.parametrize(("vocab", "num_ranks"), [(9, 8), (5, 4), (17, 16), (2, 8)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_ranks_of_padding_alone_take_no_probability(vocab: int, num_ranks: int, smoothing: float) -> None:
    assert -(-vocab // num_ranks) * (num_ranks - 1) >= vocab, "the last rank holds padding alone"
    values = case(33, vocab)
    assert_close(on_ranks(*values, num_ranks, smoothing), truth(*values, smoothing), 1e-12)


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf, 1e300])
def test_what_stands_in_padded_columns_does_not_matter(padding: float) -> None:
    logits, labels = case(20, 10)
    clean, dirty = on_ranks(logits, labels, 4, 0.1, padding=0.0), on_ranks(logits, labels, 4, 0.1, padding=padding)
    assert clean[0].equal(dirty[0])
    assert clean[1].equal(dirty[1])


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.1), (0.2, 0.1)])
def test_ignored_tokens_have_no_loss_and_no_gradient(smoothing: float, z_loss: float) -> None:
    logits, labels = case(40, 12)
    labels[:7] = IGNORED_LABEL
    loss, gradient = on_ranks(logits, labels, 3, smoothing, z_loss)
    assert not loss[:7].any()
    assert not gradient[:7].any()
    assert not any(t.any() for t in on_ranks(logits, torch.full_like(labels, IGNORED_LABEL), 2, smoothing, z_loss))


@pytest.mark.parametrize("label", [12, 15, -1, 10**9])
def test_a_label_outside_the_vocabulary_is_not_taken_for_another(label: int) -> None:
    logits, labels = case(6, 12)
    labels[:] = 3
    labels[2] = label
    loss, _ = on_ranks(logits, labels, 3)
    assert loss[2] == math.inf
    assert loss[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("num_ranks", [1, 4])
@pytest.mark.parametrize("shift", [-3e4, -300.0, 0.0, 300.0, 3e4])
def test_float32_is_right_far_from_zero(num_ranks: int, shift: float) -> None:
    logits, labels = case(100, 50, torch.float32)
    logits = logits + shift
    # Differences of logits are exact or nearly so, and no sum is ever held at the height of the logits: the error does
    # not grow with the shift.
    assert_close(on_ranks(logits, labels, num_ranks), truth(logits, labels), 3e-6)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("low", [-1e2, -1e5])
def test_loss_keeps_its_digits_when_the_first_column_lies_far_below_the_maximum(ranks: int, low: float) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits[:, 0] = logits[:, 4] = low
    labels = torch.tensor([1, 2, 3, 6, 7])
    assert_close(on_ranks(logits, labels, ranks), truth(logits, labels), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32_losses_and_rounded_gradients(dtype: torch.dtype) -> None:
    logits, labels = case(64, 40, dtype)
    loss, gradient = on_ranks(logits, labels, 2, 0.1, 1e-3, padding=7.0)
    expected = truth(logits, labels, 0.1, 1e-3)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=3 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_label_of_probability_near_one_keeps_its_gradient_in_bfloat16() -> None:
    logits = torch.zeros(1, 40, dtype=torch.bfloat16)
    logits[0, 5] = 9.0
    labels = torch.tensor([5])
    gradient, expected = on_ranks(logits, labels, 2)[1][0, 5], truth(logits, labels)[1][0, 5]
    assert expected.item() == pytest.approx(-0.0048, abs=1e-4)
    assert gradient.item() == pytest.approx(expected.item(), rel=4e-3), "one minus a bfloat16 would be 0 or -0.0078"


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.3, 0.05)])
def test_gradient_is_the_slope_of_the_loss(num_ranks: int, smoothing: float, z_loss: float) -> None:
    logits, labels = case(4, 7)
    _, gradient = on_ranks(logits, labels, num_ranks, smoothing, z_loss)
    step = 1e-6
    for token in range(4):
        for column in range(7):
            up, down = logits.clone(), logits.clone()
            up[token, column] += step
            down[token, column] -= step
            ends = (on_ranks(end, labels, num_ranks, smoothing, z_loss)[0].sum() for end in (up, down))
            slope = (next(ends) - next(ends)) / (2 * step)
            assert gradient[token, column] == pytest.approx(slope.item(), abs=1e-7)


def test_rows_that_do_not_fit_the_cache_together_are_all_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    values = case(67, 16)
    whole = on_ranks(*values, 2, 0.1)
    monkeypatch.setattr(
        "trimaran.kernels.cross_entropy._CACHED_BYTES", 8 * 8 * 10
    )  # ten rows of a rank's eight float64
    for a, b in zip(on_ranks(*values, 2, 0.1), whole, strict=True):
        assert a.equal(b)
