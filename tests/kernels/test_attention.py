"""The attention reference against the definition in float64, in every variant, and dropout that no layout changes."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from tests.kernels.covering import covering_array, label
from trimaran.kernels.attention import (
    CAUSAL,
    AttentionDropout,
    AttentionOptions,
    Documents,
    alibi_slopes,
    attention,
    attention_with_lse,
    triton_attention,
)
from trimaran.kernels.attention.options import Sizes
from trimaran.kernels.attention.reference import attention_keep_mask
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


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions = CAUSAL,
    slopes: Tensor | None = None,
    documents: Documents | None = None,
    keep: Tensor | None = None,
    rate: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return equation 1 of Vaswani et al., one sample, head and query at a time, and its log-sum-exp."""
    (batch, seq, heads, head_dim), keys = q.shape, k.shape[1]
    per_group = heads // k.shape[2]
    numbers = torch.zeros(batch, seq) if documents is None else documents.numbers.view(batch, seq)
    outputs, statistics = [], []
    for b, t, head in itertools.product(range(batch), range(seq), range(heads)):
        position = t + keys - seq
        near = [j for j in range(keys) if options.window is None or abs(position - j) < options.window]
        seen = [
            j
            for j in near
            if (j <= position or not options.causal) and (documents is None or numbers[b, j] == numbers[b, t])
        ]
        scores = k[b, seen, head // per_group] @ q[b, t, head] * (options.scale or 1 / math.sqrt(head_dim))
        if options.softcap is not None:
            scores = options.softcap * (scores / options.softcap).tanh()
        if slopes is not None:
            scores = scores - slopes[head] * torch.tensor([abs(position - j) for j in seen])
        weights = scores.exp() / scores.exp().sum()
        if keep is not None:
            weights = torch.where(keep[b, head, t, seen], weights / (1 - rate), 0.0)
        outputs.append(weights @ v[b, seen, head // per_group])
        statistics.append(scores.exp().sum().log())
    return torch.stack(outputs).view(batch, seq, heads, head_dim), torch.stack(statistics).view(batch, seq, heads)


OPTIONS = {
    "causal": AttentionOptions(),
    "full": AttentionOptions(causal=False),
    "window": AttentionOptions(window=3),
    "two-sided window": AttentionOptions(causal=False, window=2),
    "softcap": AttentionOptions(softcap=0.7),
    "scale": AttentionOptions(scale=0.3),
    "window and softcap": AttentionOptions(window=4, softcap=2.0, causal=False),
}


def dropout_of(
    rate: float, first_sample: int = 0, first_head: int = 0, total_heads: int = 6
) -> AttentionDropout | None:
    return AttentionDropout(rate, KEY, first_sample, first_head, total_heads) if rate else None


def mask_of(dropout: AttentionDropout, batch: int, heads: int, seq: int, documents: Documents | None = None) -> Tensor:
    return attention_keep_mask(dropout, Sizes(batch, seq, seq, heads, heads, 1), documents, CPU)


VARIANTS: dict[str, Sequence[Any]] = {
    "name": tuple(OPTIONS),
    "alibi": (False, True),
    "documents": (False, True),
    "rate": (0.0, 0.3),
}


@pytest.mark.parametrize("case", covering_array(VARIANTS), ids=label)
def test_every_two_options_together_and_their_gradients_equal_the_definition(case: dict[str, Any]) -> None:
    name, alibi, packed, rate = case.values()
    options, tensors = OPTIONS[name], qkv(2, 7, 6, 2, 4)
    slopes = torch.tensor(alibi_slopes(6)) if alibi else None
    documents = Documents(torch.tensor([0, 3, 4, 7, 14], dtype=torch.int32), longest=7) if packed else None
    dropout = dropout_of(rate)
    keep = mask_of(dropout, 2, 6, 7, documents) if dropout else None
    more = {"slopes": slopes, "documents": documents}
    expected, lse = reference(*tensors, options, slopes, documents, keep, rate)
    out, (explicit, found_lse) = (
        attention(*tensors, options, **more, dropout=dropout),
        attention_with_lse(*tensors, options, **more, dropout=dropout),
    )
    generator = torch.Generator().manual_seed(6)
    dy, dlse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (expected, lse))
    for ours in (out, explicit):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
        got, wanted = (torch.autograd.grad(y, tensors, dy, retain_graph=True) for y in (ours, expected))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-12)
    got, wanted = (torch.autograd.grad(y, tensors[:2], dlse) for y in (found_lse, lse))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, int, int, int, int]) -> None:
    tensors = qkv(*shape)
    torch.testing.assert_close(attention(*tensors), reference(*tensors)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_fewer_queries_than_keys_are_the_last_ones(name: str) -> None:
    q, k, v = qkv(2, 9, 4, 2, 4)
    whole, part = attention(q, k, v, OPTIONS[name]), attention(q[:, 6:], k, v, OPTIONS[name])
    torch.testing.assert_close(part, whole[:, 6:], rtol=0, atol=1e-12)


def test_parts_of_the_keys_combine_by_their_log_sum_exp() -> None:
    q, k, v = qkv(1, 6, 4, 2, 4)
    full = AttentionOptions(causal=False)
    (left, left_lse), (right, right_lse) = (
        attention_with_lse(q, k[:, part], v[:, part], full) for part in (slice(0, 4), slice(4, 6))
    )
    lse = torch.logaddexp(left_lse, right_lse)
    combined = left * (left_lse - lse).exp().unsqueeze(-1) + right * (right_lse - lse).exp().unsqueeze(-1)
    torch.testing.assert_close(combined, attention(q, k, v, full), rtol=0, atol=1e-12)


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    q, k, v = qkv(1, 5, 2, 1, 4)
    out, lse = attention_with_lse(q, k[:, :3], v[:, :3])
    assert (out[:, :2] == 0).all()
    assert (lse[:, :2] == -torch.inf).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", ["causal", "window and softcap"])
def test_gradcheck(name: str, kv_heads: int, rate: float) -> None:
    call = lambda q, k, v: attention_with_lse(q, k, v, OPTIONS[name], dropout=dropout_of(rate))
    assert torch.autograd.gradcheck(call, qkv(1, 3, 4, kv_heads, 2))


def test_alibi_slopes_are_the_published_ones() -> None:
    # Press et al. 2022, section 3: 1/2, 1/4, ... 1/256 for eight heads; BLOOM's file for twelve heads of transformers.
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    theirs = build_alibi_tensor(torch.ones(1, 2), 12, torch.float32).view(12, 2)[:, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(12)), theirs, rtol=1e-6, atol=0)


BAD = [
    ({"q": (2, 3, 4)}, r"needs q \[batch, seq, heads, head_dim\]"),
    ({"k": (2, 3, 3, 8), "v": (2, 3, 3, 8)}, r"query heads \(4\) must be a multiple of its key-value heads \(3\)"),
    ({"v": (2, 3, 2, 9)}, r"v \(2, 3, 2, 9\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("op", [attention, attention_with_lse, triton_attention])
def test_shapes_that_do_not_fit_are_refused(
    op: Callable[..., Any], change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 2, 8), "v": (2, 3, 2, 8)} | change
    with pytest.raises(ValueError, match=message):
        op(*(torch.zeros(shape) for shape in shapes.values()))


@pytest.mark.parametrize(("field", "value"), [("window", 0), ("softcap", -1.0), ("scale", 0.0)])
def test_options_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}.*must be positive"):
        AttentionOptions(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("op", [attention, triton_attention])
def test_dtypes_that_do_not_fit_are_refused(op: Callable[..., Any]) -> None:
    q, k, v = (x.detach().float() for x in qkv(1, 4, 2, 2, 4))
    with pytest.raises(ValueError, match="one dtype"):
        op(q, k.half(), v)
    with pytest.raises(ValueError, match="must be int32"):
        op(q, k, v, documents=Documents(torch.tensor([0, 4]), longest=4))


def test_triton_makes_no_gradient_of_slopes() -> None:
    q, k, v = (x.detach().float() for x in qkv(1, 4, 2, 2, 4))
    with pytest.raises(ValueError, match="detach them"):
        triton_attention(q, k, v, slopes=torch.ones(2, requires_grad=True))


def test_documents_need_whole_sequences_and_slopes_one_a_head() -> None:
    q, k, v = qkv(1, 4, 2, 2, 4)
    documents = Documents(torch.tensor([0, 4], dtype=torch.int32), longest=4)
    with pytest.raises(ValueError, match="as many queries"):
        attention(q[:, 1:], k, v, documents=documents)
    with pytest.raises(ValueError, match=r"one ALiBi slope a query head \(2\)"):
        attention(q, k, v, slopes=torch.ones(3))


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
    dropout = dropout_of(rate, total_heads=12)
    expected = attention(*(t.contiguous() for t in (q, k, v)), dropout=dropout)
    torch.testing.assert_close(attention(q, k, v, dropout=dropout), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_bfloat16_stays_near_float64(rate: float) -> None:
    tensors = qkv(2, 40, 4, 2, 16, torch.bfloat16)
    dropout = dropout_of(rate, total_heads=4)
    keep = mask_of(dropout, 2, 4, 40) if dropout else None
    out = attention(*tensors, dropout=dropout)
    assert out.dtype == torch.bfloat16
    expected, _ = reference(*(t.detach().double() for t in tensors), keep=keep, rate=rate)
    assert (out.double() - expected).norm() < 1e-2 * expected.norm()


def test_dropout_mask_of_any_samples_and_heads_is_a_part_of_the_whole() -> None:
    batch, heads, seq, rate = 5, 6, 7, 0.3
    whole = mask_of(AttentionDropout(rate, KEY, 10, 0, heads), batch, heads, seq)
    assert whole.shape == (batch, heads, seq, seq)
    for first_sample, samples, first_head, local in [
        (10, 5, 0, 3),
        (10, 5, 3, 3),
        (12, 1, 0, 6),
        (13, 2, 4, 2),
        (14, 1, 5, 1),
    ]:
        part = mask_of(AttentionDropout(rate, KEY, first_sample, first_head, heads), samples, local, seq)
        rows = slice(first_sample - 10, first_sample - 10 + samples)
        assert part.equal(whole[rows, first_head : first_head + local])


def test_dropout_mask_rows_are_the_documented_ones() -> None:
    mask = mask_of(AttentionDropout(0.5, KEY, 3, 2, 4), 1, 1, 6)
    rows = torch.tensor([((3 * 4 + 2) * 6) + query for query in range(6)])
    assert mask[0, 0].equal(keep_mask(KEY, rows, 6, 0.5))


def test_dropout_masks_of_samples_heads_and_queries_differ() -> None:
    mask = mask_of(AttentionDropout(0.5, KEY, 0, 0, 4), 3, 4, 32).view(-1, 32)
    assert len(mask.unique(dim=0)) == len(mask)
    assert abs(mask.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(mask.numel())


def test_dropout_keeps_the_mean() -> None:
    q, k, _ = qkv(400, 16, 2, 2, 4)
    out = attention(q, k, torch.ones_like(k), dropout=dropout_of(0.25, total_heads=2))
    # Without the division by 1 - rate the mean would be 0.75; the standard error is below 0.58 / sqrt(12800).
    assert abs(out.mean() - 1) < 0.02
