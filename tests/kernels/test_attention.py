"""Causal attention against an explicit softmax in float64, grouped-query heads, and dropout that no layout changes."""

import math

import pytest
import torch
from torch import Tensor

from trimaran.kernels.attention import attention, attention_keep_mask
from trimaran.kernels.dispatch import choose_attention
from trimaran.kernels.random import keep_mask, stream_key

CPU = torch.device("cpu")
KEY = stream_key(3, "layers.0.attention.probabilities")
# batch, seq, heads, kv_heads, head_dim
SHAPES = [(1, 1, 1, 1, 1), (2, 7, 3, 3, 5), (2, 9, 6, 2, 4), (1, 33, 4, 1, 8), (3, 2, 8, 4, 3)]


def qkv(
    batch: int, seq: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    counts = (heads, kv_heads, kv_heads)
    drawn = (torch.randn(batch, seq, count, head_dim, generator=generator, dtype=torch.float64) for count in counts)
    return tuple(t.to(dtype).requires_grad_() for t in drawn)  # type: ignore[return-value]


def reference(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, rate: float = 0.0) -> Tensor:
    """Query by query and head by head, as equation 1 of Vaswani et al. says it."""
    batch, seq, heads, head_dim = q.shape
    per_group = heads // k.shape[2]
    rows = []
    for head in range(heads):
        kv = head // per_group
        for t in range(seq):
            scores = torch.einsum("bd,bsd->bs", q[:, t, head], k[:, : t + 1, kv]) / math.sqrt(head_dim)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            if keep is not None:
                weights = torch.where(keep[:, head, t, : t + 1], weights / (1 - rate), 0.0)
            rows.append(torch.einsum("bs,bsd->bd", weights, v[:, : t + 1, kv]))
    return torch.stack(rows, dim=1).view(batch, heads, seq, head_dim).transpose(1, 2)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_equal_the_explicit_softmax(shape: tuple[int, int, int, int, int], rate: float) -> None:
    batch, seq, heads, _, _ = shape
    tensors = qkv(*shape)
    keep = attention_keep_mask(KEY, 0, batch, 0, heads, heads, seq, rate, CPU) if rate else None
    out, expected = attention(*tensors, keep, rate), reference(*tensors, keep, rate)
    assert out.shape == tensors[0].shape
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, tensors, dy) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gradcheck(kv_heads: int, rate: float) -> None:
    keep = attention_keep_mask(KEY, 0, 1, 0, 4, 4, 3, rate, CPU) if rate else None
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, keep, rate), qkv(1, 3, 4, kv_heads, 2))


def test_an_output_does_not_see_later_positions() -> None:
    q, k, v = qkv(1, 6, 2, 2, 4)
    before = attention(q, k, v)
    changed = [t.detach().clone() for t in (q, k, v)]
    for t in changed:
        t[:, 4:] = 100.0
    after = attention(*changed)
    assert after[:, :4].equal(before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


def test_a_group_of_query_heads_reads_its_own_key_value_head() -> None:
    q, k, v = qkv(1, 5, 4, 2, 3)
    out = attention(q, k, v)
    changed = v.detach().clone()
    changed[:, :, 1] += 1.0
    difference = (attention(q, k, changed) - out).abs().amax(dim=(0, 1, 3))
    assert difference[:2].equal(torch.zeros(2, dtype=torch.float64))
    assert (difference[2:] > 0.9).all()


def test_empty_batch_gives_an_empty_result() -> None:
    assert attention(*qkv(0, 4, 2, 2, 3)).shape == (0, 4, 2, 3)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_non_contiguous_views_give_what_contiguous_tensors_give(rate: float) -> None:
    packed = torch.randn(2, 6, 5, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64).transpose(1, 2)
    views = packed.chunk(3, dim=-1)
    q, k, v = (view.unflatten(-1, (2, 4)).flatten(2, 3) for view in views)
    keep = attention_keep_mask(KEY, 0, 2, 0, 12, 12, 5, rate, CPU) if rate else None
    expected = attention(*(t.contiguous() for t in (q, k, v)), keep, rate)
    torch.testing.assert_close(attention(q, k, v, keep, rate), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_bfloat16_stays_near_float64(rate: float) -> None:
    tensors = qkv(2, 40, 4, 2, 16, torch.bfloat16)
    keep = attention_keep_mask(KEY, 0, 2, 0, 4, 4, 40, rate, CPU) if rate else None
    out = attention(*tensors, keep, rate)
    assert out.dtype == torch.bfloat16
    expected = reference(*(t.detach().double() for t in tensors), keep, rate)
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()


def test_dropout_mask_of_any_samples_and_heads_is_a_part_of_the_whole() -> None:
    batch, heads, seq, rate = 5, 6, 7, 0.3
    whole = attention_keep_mask(KEY, 10, batch, 0, heads, heads, seq, rate, CPU)
    assert whole.shape == (batch, heads, seq, seq)
    for first_sample, samples, first_head, local in [(10, 5, 0, 3), (10, 5, 3, 3), (12, 1, 0, 6), (13, 2, 4, 2), (14, 1, 5, 1)]:
        part = attention_keep_mask(KEY, first_sample, samples, first_head, local, heads, seq, rate, CPU)
        rows = slice(first_sample - 10, first_sample - 10 + samples)
        assert part.equal(whole[rows, first_head : first_head + local])


def test_dropout_mask_rows_are_the_documented_ones() -> None:
    mask = attention_keep_mask(KEY, 3, 1, 2, 1, 4, 6, 0.5, CPU)
    rows = torch.tensor([((3 * 4 + 2) * 6) + query for query in range(6)])
    assert mask[0, 0].equal(keep_mask(KEY, rows, 6, 0.5))


def test_dropout_masks_of_samples_heads_and_queries_differ() -> None:
    mask = attention_keep_mask(KEY, 0, 3, 0, 4, 4, 32, 0.5, CPU).view(-1, 32)
    assert len(mask.unique(dim=0)) == len(mask)
    assert abs(mask.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(mask.numel())


def test_dropout_keeps_the_mean() -> None:
    q, k, _ = qkv(400, 16, 2, 2, 4)
    out = attention(q, k, torch.ones_like(k), attention_keep_mask(KEY, 0, 400, 0, 2, 2, 16, 0.25, CPU), 0.25)
    # Without the division by 1 - rate the mean would be 0.75; the standard error is below 0.58 / sqrt(12800).
    assert abs(out.mean() - 1) < 0.02


def test_dispatch_knows_its_backends_by_name() -> None:
    assert choose_attention(CPU) is attention
    assert choose_attention(CPU, "torch") is attention
    with pytest.raises(ValueError, match="'triton-nightly' for cpu is not known; choose 'auto' or 'torch'"):
        choose_attention(CPU, "triton-nightly")  # type: ignore[arg-type]
