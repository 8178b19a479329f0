"""Attention over a key-value cache against a loop in float64 and torch's causal attention; cache writes; key splits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.kernels.decode import append_to_cache_, decode_attention, triton_append_to_cache_, triton_decode_attention
from trimaran.kernels.decode.split import num_splits

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 7},
    {"window": 1000},
    {"softcap": 2.0},
    {"alibi": True},
    {"scale": 0.3},
    {"window": 9, "softcap": 1.5, "alibi": True, "scale": 0.7},
]
LENGTHS = [[23, 23, 23], [40, 1, 0], [2, 40, 39], [0, 0, 0]]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def forget_the_rest(cache: Tensor, lengths: Tensor) -> Tensor:
    """A cache [batch, max_len, kv_heads, head_dim] with NaN past each sample's tokens."""
    past = torch.arange(cache.shape[1]) >= lengths[:, None]
    return cache.masked_fill(past[:, :, None, None], torch.nan)


def paged(cache: Tensor, lengths: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The same cache in shuffled pages, and its block table, whose entries past the tokens point nowhere."""
    batch, capacity = cache.shape[:2]
    pages = cache.unflatten(1, (-1, block_size)).flatten(0, 1)
    order = torch.randperm(len(pages) + 3, generator=torch.Generator().manual_seed(4))[: len(pages)]
    blocks = torch.full((len(pages) + 3, *pages.shape[1:]), torch.nan, dtype=cache.dtype)
    blocks[order] = pages
    table = order.view(batch, capacity // block_size).to(torch.int32)
    used = torch.arange(0, capacity, block_size) < lengths[:, None]
    return blocks, table.where(used, -7)


def reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, options: dict[str, Any]) -> Tensor:
    """Sample by sample, query by query and head by head, as the definition says it."""
    out = torch.zeros_like(q)
    batch, q_len, heads, head_dim = q.shape
    scale = options.get("scale", head_dim**-0.5)
    for b, i, h in itertools.product(range(batch), range(q_len), range(heads)):
        position = int(lengths[b]) - q_len + i
        first = max(0, position - options.get("window", position + 1) + 1)
        if position < 0:
            continue
        kv = h // (heads // k_cache.shape[2])
        scores = k_cache[b, first : position + 1, kv] @ q[b, i, h] * scale
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        if "alibi_slopes" in options:
            scores = scores - options["alibi_slopes"][h] * (position - torch.arange(first, position + 1))
        weights = scores.exp() / scores.exp().sum()
        out[b, i, h] = weights @ v_cache[b, first : position + 1, kv]
    return out


def with_slopes(options: dict[str, Any], heads: int) -> dict[str, Any]:
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1, heads + 1, dtype=torch.float32)
    return options


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_definition(options: dict[str, Any], lengths: list[int], q_len: int, block_size: int | None) -> None:
    for heads, kv_heads, head_dim in [(4, 2, 8), (3, 3, 5), (4, 1, 3)]:
        told, counts = with_slopes(options, heads), int32(*lengths)
        q = draw(3, q_len, heads, head_dim)
        k, v = (forget_the_rest(draw(3, 40, kv_heads, head_dim, seed=seed), counts) for seed in (2, 3))
        expected = reference(q, k, v, counts, told)
        table = None
        if block_size is not None:
            (k, table), (v, _) = (paged(cache, counts, block_size) for cache in (k, v))
        out = decode_attention(q, k, v, counts, block_table=table, **told)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("q_len", [1, 5, 12])
def test_equals_causal_attention_over_the_whole_sequence(q_len: int) -> None:
    q, k, v = draw(2, 12, 6, 16), draw(2, 12, 2, 16, seed=2), draw(2, 12, 2, 16, seed=3)
    whole = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    k_cache, v_cache = (F.pad(x, (0, 0, 0, 0, 0, 9), value=torch.nan) for x in (k, v))
    out = decode_attention(q[:, -q_len:], k_cache, v_cache, int32(12, 12))
    torch.testing.assert_close(out, whole[:, -q_len:], rtol=0, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"alibi": True}, {"scale": 0.3}, {"window": 300}], ids=str)
def test_one_token_of_samples_whose_lengths_differ_much(options: dict[str, Any]) -> None:
    """Each is the last one of its own sequence's attention; a sample without tokens gives zeros."""
    lengths = int32(900, 3, 0, 40)
    k, v = (forget_the_rest(draw(4, 1000, 2, 8, seed=seed), lengths) for seed in (1, 2))
    q = draw(4, 1, 6, 8, seed=3)
    arguments = {**options, "alibi_slopes": torch.rand(6) if options.get("alibi") else None}
    arguments.pop("alibi", None)
    found = decode_attention(q, k, v, lengths, **arguments)
    for sample, length in enumerate(lengths.tolist()):
        part = slice(sample, sample + 1)
        alone = decode_attention(q[part], k[part], v[part], lengths[part], **arguments)
        torch.testing.assert_close(found[part], alone, rtol=0, atol=1e-12)
        assert length or not found[part].any()


def test_keys_before_the_window_are_of_no_account_and_their_pages_are_not_read() -> None:
    lengths = int32(33, 17)
    q, k, v = draw(2, 2, 4, 8), draw(2, 40, 2, 8, seed=2), draw(2, 40, 2, 8, seed=3)
    expected = decode_attention(q, k, v, lengths, window=5)
    gone = torch.arange(40) <= lengths[:, None] - 2 - 5  # no query of two sees them
    k, v = (x.masked_fill(gone[:, :, None, None], torch.inf) for x in (k, v))
    torch.testing.assert_close(decode_attention(q, k, v, lengths, window=5), expected, rtol=0, atol=1e-13)
    (k, table), (v, _) = (paged(cache, lengths, 8) for cache in (k, v))
    table = table.masked_fill(gone.view(2, 5, 8).all(-1), 10**6)
    torch.testing.assert_close(
        decode_attention(q, k, v, lengths, window=5, block_table=table), expected, rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"alibi": True}, {"softcap": 5.0, "window": 30}], ids=str)
def test_lower_precision_stays_near_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    for lengths in (int32(64, 64), int32(64, 31)):
        q, k, v = (draw(2, n, h, 32).to(dtype) for n, h in [(2, 4), (64, 2), (64, 2)])
        out = decode_attention(q, k, v, lengths, **with_slopes(options, 4))
        expected = decode_attention(q.double(), k.double(), v.double(), lengths, **with_slopes(options, 4))
        assert out.dtype == dtype
        assert (out.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("shape", [(0, 1, 4, 8), (2, 0, 4, 8), (2, 1, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    cache = torch.zeros(shape[0], 6, 2, 8)
    for op in (decode_attention, triton_decode_attention):
        assert op(torch.zeros(shape), cache, cache, torch.ones(shape[0], dtype=torch.int32)).shape == shape


def test_non_contiguous_views_give_what_contiguous_tensors_give() -> None:
    packed = draw(2, 1, 4, 24)
    q = packed[..., 8:16]
    caches = draw(3, 30, 2, 2, 16).transpose(0, 1)[:30:3, :2].transpose(0, 1)  # [2, 10, 2, 2, 16]
    k, v = caches[:, :, 0, :, ::2], caches[:, :, 1, :, :8]
    for lengths in (int32(9, 9), int32(3, 10)):
        expected = decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), lengths)
        torch.testing.assert_close(decode_attention(q, k, v, lengths), expected, rtol=0, atol=1e-13)


def test_no_gradient_flows_and_nothing_changes() -> None:
    q, k, v = (draw(1, n, 2, 4).requires_grad_() for n in (1, 6, 6))
    before = k.detach().clone()
    assert not decode_attention(q, k, v, int32(4)).requires_grad
    assert k.detach().equal(before)


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("lengths", [[5, 5], [16, 3], [1, 0]], ids=str)
def test_appended_tokens_stand_at_the_end_and_nothing_else_changes(lengths: list[int], block_size: int | None) -> None:
    k_new, v_new = draw(2, 3, 2, 4), draw(2, 3, 4, 2).transpose(2, 3)
    k, v = draw(2, 16, 2, 4, seed=2), draw(2, 16, 2, 4, seed=3)
    k_expected, v_expected = k.clone(), v.clone()
    for b, length in enumerate(lengths):
        for i in range(max(0, 3 - length), 3):
            k_expected[b, length - 3 + i], v_expected[b, length - 3 + i] = k_new[b, i], v_new[b, i]
    if block_size is None:
        append_to_cache_(k, v, k_new, v_new, int32(*lengths))
        assert k.equal(k_expected)
        assert v.equal(v_expected)
        return
    (k_blocks, table), (v_blocks, _) = (paged(cache, int32(16, 16), block_size) for cache in (k, v))
    append_to_cache_(k_blocks, v_blocks, k_new, v_new, int32(*lengths), block_table=table)
    torch.testing.assert_close(
        k_blocks, paged(k_expected, int32(16, 16), block_size)[0], rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        v_blocks, paged(v_expected, int32(16, 16), block_size)[0], rtol=0, atol=0, equal_nan=True
    )


def test_generating_token_by_token_equals_the_whole_sequence() -> None:
    q, k, v = draw(2, 20, 4, 8), draw(2, 20, 2, 8, seed=2), draw(2, 20, 2, 8, seed=3)
    caches = [torch.full((6, 8, 2, 8), torch.nan, dtype=torch.float64) for _ in range(2)]
    table = torch.tensor([[4, 0, 3], [1, 5, 2]], dtype=torch.int32)
    whole = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    stop = 0
    for new in (7, 1, 1, 4, 1, 6):
        first, stop = stop, stop + new
        lengths = int32(stop, stop)
        append_to_cache_(*caches, k[:, first:stop], v[:, first:stop], lengths, block_table=table)
        out = decode_attention(q[:, first:stop], *caches, lengths, block_table=table)
        torch.testing.assert_close(out, whole[:, first:stop], rtol=0, atol=1e-13)


def call(op: Callable[..., Tensor], **changes: Any) -> Tensor:
    """Call `op` with arguments that fit, but for the changes."""
    cache = torch.zeros(2, 16, 2, 8)
    arguments = {"q": torch.zeros(2, 1, 4, 8), "k_cache": cache, "v_cache": cache, "lengths": int32(3, 4)}
    return op(**{**arguments, **changes})


WRONG = [
    ({"q": torch.zeros(2, 4, 8)}, r"q must be \[batch, tokens, heads, head_dim\].*\[2, 4, 8\]"),
    ({"v_cache": torch.zeros(2, 15, 2, 8)}, r"one shape.*\[2, 16, 2, 8\] and \[2, 15, 2, 8\]"),
    ({"q": torch.zeros(2, 1, 4, 6)}, "one head_dim; they have 6 and 8"),
    ({"q": torch.zeros(2, 1, 3, 8)}, r"heads of q \(3\) must be a multiple of the cache's kv_heads \(2\)"),
    ({"q": torch.zeros(2, 1, 4, 8).half()}, "one dtype; they have torch.float16, torch.float32"),
    ({"q": torch.zeros(2, 17, 4, 8)}, "q has 17 tokens, over the cache's capacity of 16"),
    ({"q": torch.zeros(3, 1, 4, 8), "lengths": int32(1, 2, 3)}, "the batch of q, 3; it has 2"),
    ({"lengths": torch.tensor([3, 4])}, r"lengths must be int32 of shape \[2\] \(batch\); it is torch.int64"),
    ({"lengths": int32(3)}, r"lengths must be int32 of shape \[2\] \(batch\); it is torch.int32 of shape \[1\]"),
    ({"lengths": int32(3, 17)}, r"lengths must be in \[0, 16\].*in \[3, 17\]"),
    ({"lengths": int32(-1, 7)}, r"lengths must be in \[0, 16\].*in \[-1, 7\]"),
    ({"block_table": torch.zeros(2, 3)}, r"block_table must be int32 of shape \[2, max_blocks\]"),
    ({"block_table": torch.zeros(1, 3, dtype=torch.int32)}, r"block_table must be int32 of shape \[2, max_blocks\]"),
    (
        {
            "k_cache": torch.zeros(4, 4, 2, 8),
            "v_cache": torch.zeros(4, 4, 2, 8),
            "block_table": torch.zeros(2, 3, dtype=torch.int32),
        },
        "at least 8; it is 4",
    ),
    (
        {
            "k_cache": torch.zeros(4, 12, 2, 8),
            "v_cache": torch.zeros(4, 12, 2, 8),
            "block_table": torch.zeros(2, 3, dtype=torch.int32),
        },
        "power of two.*12",
    ),
    ({"window": 0}, "window must be at least 1.*it is 0"),
    ({"softcap": 0.0}, "softcap must be positive.*it is 0.0"),
    ({"alibi_slopes": torch.zeros(2)}, r"alibi_slopes must be float32 of shape \[4\]"),
]


@pytest.mark.parametrize("op", [decode_attention, triton_decode_attention])
@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_told(op: Callable[..., Tensor], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(op, **changes)


def test_the_kernel_tells_that_a_head_is_too_wide() -> None:
    cache = torch.zeros(2, 16, 2, 320)
    with pytest.raises(ValueError, match="head_dim must be at most 256 for the Triton kernel; it is 320"):
        call(triton_decode_attention, q=torch.zeros(2, 1, 4, 320), k_cache=cache, v_cache=cache)


@pytest.mark.parametrize("op", [append_to_cache_, triton_append_to_cache_])
def test_wrong_new_tokens_are_told(op: Callable[..., None]) -> None:
    cache, new = torch.zeros(2, 16, 2, 8), torch.zeros(2, 1, 2, 8)
    with pytest.raises(ValueError, match=r"kv_heads \(2\); they are torch.float32 \[2, 1, 4, 8\]"):
        op(cache, cache, new.repeat(1, 1, 2, 1), new.repeat(1, 1, 2, 1), int32(1, 1))
    with pytest.raises(ValueError, match="one shape and dtype"):
        op(cache, cache, new, new[:1], int32(1, 1))
    with pytest.raises(ValueError, match="over the cache's capacity of 16"):
        op(cache, cache, torch.zeros(2, 17, 2, 8), torch.zeros(2, 17, 2, 8), int32(16, 16))


@pytest.mark.parametrize("slots", [1, 108, 264, 296])
def test_the_number_of_splits(slots: int) -> None:
    for programs, tiles in itertools.product([1, 7, 8, 32, 100, 250, 1000], [0, 1, 2, 5, 8, 64, 1000]):
        splits = num_splits(programs, tiles, slots)
        assert 1 <= splits <= max(1, min(tiles, 128))
        assert splits == 1 or programs * splits <= 3 * slots
        if programs >= slots:
            assert splits == 1


def test_a_long_sequence_alone_fills_the_chip() -> None:
    assert math.isclose(num_splits(8, 1024, 264) * 8, 264, rel_tol=0.2)
    assert num_splits(1, 1024, 264) > 100
    assert num_splits(1, 3, 264) == 3
