"""Dropout by counter: the same mask at every layout, the right rate, and a backward that uses the forward's mask."""

import math

import pytest
import torch
from torch import Tensor

from trimaran.kernels.dropout import dropout, dropout_add

BATCH, SEQ, HIDDEN = 3, 8, 10


def drop(
    x: Tensor,
    rate: float = 0.4,
    *,
    first_sample: int = 0,
    first_position: int = 0,
    seed: int = 1,
    site: str = "embedding",
) -> Tensor:
    return dropout(x, rate, seed=seed, site=site, first_sample=first_sample, first_position=first_position, seq_len=SEQ)


def ones(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def test_rate_zero_returns_the_input_itself() -> None:
    x = ones(2, 3, 4)
    assert drop(x, 0.0) is x


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_elements_are_zero_or_scaled_and_dropped_at_the_rate(rate: float) -> None:
    out = dropout(ones(4, 50, 301), rate, seed=1, site="a", first_sample=0, first_position=0, seq_len=50)
    dropped = (out == 0).double().mean()
    torch.testing.assert_close(out[out != 0], torch.full((int((out != 0).sum()),), 1 / (1 - rate), dtype=torch.float64))
    assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / out.numel())


def test_any_samples_are_a_part_of_the_whole_batch() -> None:
    whole = drop(ones(6, SEQ, HIDDEN), first_sample=100)
    for first, count in [(0, 2), (2, 3), (5, 1)]:
        assert drop(ones(count, SEQ, HIDDEN), first_sample=100 + first).equal(whole[first : first + count])


@pytest.mark.parametrize("parts", [2, 4])
def test_sequence_parts_join_to_the_whole(parts: int) -> None:
    local = SEQ // parts
    joined = torch.cat([drop(ones(BATCH, local, HIDDEN), first_position=i * local) for i in range(parts)], dim=1)
    assert joined.equal(drop(ones(BATCH, SEQ, HIDDEN)))


@pytest.mark.parametrize("other", [{"seed": 2}, {"site": "layers.0.mlp.output"}, {"first_sample": 3}])
def test_seed_site_and_sample_change_the_mask(other: dict[str, object]) -> None:
    first = drop(ones(BATCH, SEQ, 200), 0.5)
    second = drop(ones(BATCH, SEQ, 200), 0.5, **other)  # type: ignore[arg-type]
    agreement = (first == second).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(first.numel())


def test_samples_and_positions_have_masks_of_their_own() -> None:
    rows = drop(ones(BATCH, SEQ, 64), 0.5).view(-1, 64)
    assert len(rows.unique(dim=0)) == len(rows)


def test_gradcheck() -> None:
    x = torch.randn(2, SEQ, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: drop(t), (x,))


def test_non_contiguous_and_empty_input() -> None:
    x = torch.randn(SEQ, BATCH, HIDDEN, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    assert drop(x).equal(drop(x.contiguous()))
    assert drop(ones(0, SEQ, HIDDEN)).shape == (0, SEQ, HIDDEN)


def test_bfloat16_drops_the_same_elements() -> None:
    out = drop(ones(BATCH, SEQ, HIDDEN, dtype=torch.bfloat16), 0.1)
    assert out.dtype == torch.bfloat16
    assert (out == 0).equal(drop(ones(BATCH, SEQ, HIDDEN), 0.1) == 0)
    torch.testing.assert_close(out[out != 0].double().mean().item(), 1 / 0.9, rtol=2**-8, atol=0)


def test_dropout_add_adds_the_same_dropped_elements_to_the_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(BATCH, SEQ, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    where = {"seed": 1, "site": "embedding", "first_sample": 0, "first_position": 0, "seq_len": SEQ}
    before = residual.detach().clone()
    assert dropout_add(x, residual, 0.4, **where).equal(residual + drop(x))  # type: ignore[arg-type]
    assert dropout_add(x, residual, 0.0, **where).equal(residual + x)  # type: ignore[arg-type]
    assert residual.equal(before)
    assert torch.autograd.gradcheck(lambda a, b: dropout_add(a, b, 0.4, **where), (x, residual))


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan])
def test_a_rate_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"at least 0 and below 1, got {rate}"):
        drop(ones(1, SEQ, 4), rate)


def test_a_residual_of_another_shape_is_refused() -> None:
    where = {"seed": 1, "site": "embedding", "first_sample": 0, "first_position": 0, "seq_len": SEQ}
    with pytest.raises(
        ValueError, match=r"x and residual must have one shape; they have \(2, \d+, 4\) and \(1, \d+, 4\)"
    ):
        dropout_add(ones(2, SEQ, 4), ones(1, SEQ, 4), 0.1, **where)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_residual_of_another_dtype_gives_the_dtype_of_x_and_gets_its_own_gradient(rate: float) -> None:
    where = {"seed": 1, "site": "embedding", "first_sample": 0, "first_position": 0, "seq_len": SEQ}
    x = ones(2, SEQ, 4, dtype=torch.bfloat16)
    residual = ones(2, SEQ, 4, dtype=torch.float32).requires_grad_()
    out = dropout_add(x, residual, rate, **where)  # type: ignore[arg-type]
    assert out.dtype == torch.bfloat16
    assert set(out.unique().tolist()) == ({2.0} if rate == 0.0 else {1.0, 3.0})
    out.sum().backward()
    assert residual.grad is not None
    assert residual.grad.equal(torch.ones_like(residual))
