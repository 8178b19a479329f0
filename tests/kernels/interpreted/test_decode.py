"""The kernels of attention over a key-value cache, and of writing to it, in the interpreter."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.covering import covered, covering_array, label, pairs_of
from trimaran.kernels import decode
from trimaran.kernels.decode import split as split_file

EqualsReference = Callable[..., None]
SLOPES = torch.tensor([1.0, 0.5, 0.25, 0.125])
# Tiles are 16 keys long: the longest sample has three, the last of them cut.
LEVELS: dict[str, Sequence[Any]] = {
    "window": (None, 1, 19),
    "softcap": (None, 2.0),
    "alibi": (False, True),
    "scale": (None, 0.2),
    "queries": (1, 3),
    "block_size": (0, 8),
    "head_dim": (16, 64),
    "dtype": (torch.float32, torch.float16),
}
EVERYTHING = {name: levels[-1] for name, levels in LEVELS.items()}
CASES = [*covering_array(LEVELS), EVERYTHING]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(
    lengths: Tensor, capacity: int, kv_heads: int, head_dim: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return caches with NaN past each sample's tokens: contiguous for a block size of 0, else shuffled pages.

    The table of the pages points to NaN past the tokens too.
    """
    k, v = (draw(len(lengths), capacity, kv_heads, head_dim, seed=seed) for seed in (2, 3))
    past = torch.arange(capacity) >= lengths[:, None]
    k, v = (x.masked_fill(past[:, :, None, None], torch.nan) for x in (k, v))
    if not block_size:
        return k, v, None
    count = len(lengths) * capacity // block_size
    order = torch.randperm(count + 3, generator=torch.Generator().manual_seed(4))
    blocks = [torch.full((count + 3, block_size, kv_heads, head_dim), torch.nan, dtype=torch.float64) for _ in range(2)]
    for pages, x in zip(blocks, (k, v), strict=True):
        pages[order[:count]] = x.reshape(count, block_size, kv_heads, head_dim)
    table = order[:count].view(len(lengths), -1).to(torch.int32)
    used = torch.arange(0, capacity, block_size) < lengths[:, None]
    return *blocks, table.where(used, int(order[-1]))


def hold(
    equals_reference: EqualsReference,
    lengths: Tensor,
    capacity: int,
    q: Tensor,
    kv_heads: int,
    dtype: torch.dtype,
    block_size: int = 0,
    **options: Any,
) -> None:
    """Hold the kernel against the reference."""
    k, v, table = caches(lengths, capacity, kv_heads, q.shape[3], block_size)
    told = {**options, "block_table": table}
    kernel, reference = (
        lambda q, k, v, op=op: op(q, k, v, lengths, **told)
        for op in (decode.triton_decode_attention, decode.decode_attention)
    )
    equals_reference(kernel, reference, [q, k, v], dtype)


def test_the_cases_cover_every_pair_of_options() -> None:
    assert pairs_of(LEVELS, lambda levels: False) == covered(CASES, LEVELS)
    assert len(CASES) <= 11


@pytest.mark.parametrize("case", CASES, ids=label)
def test_options(case: dict[str, Any], equals_reference: EqualsReference) -> None:
    options = {name: case[name] for name in ("window", "softcap", "scale")}
    q, slopes = draw(3, case["queries"], 4, case["head_dim"]), SLOPES if case["alibi"] else None
    lengths, block_size = int32(37, 1, 0), case["block_size"]
    hold(equals_reference, lengths, 40, q, 2, case["dtype"], block_size, alibi_slopes=slopes, **options)


# q_len, heads, kv_heads, head_dim: one row to several tiles of rows, and widths that are no power of two
SHAPES = [
    (1, 1, 1, 1),
    (1, 3, 3, 3),
    (5, 7, 1, 24),
    (12, 2, 1, 64),
    (1, 8, 2, 80),
    (2, 4, 4, 96),
    (1, 2, 1, 128),
    (1, 2, 2, 256),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_and_widths(shape: tuple[int, int, int, int], equals_reference: EqualsReference) -> None:
    q_len, heads, kv_heads, head_dim = shape
    hold(equals_reference, int32(37, 20), 40, draw(2, q_len, heads, head_dim), kv_heads, torch.float32)


def test_any_number_of_splits_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = int32(75, 20)
    q, (k, v, table) = draw(2, 2, 2, 16).float(), caches(lengths, 80, 1, 16, 16)
    expected = decode.decode_attention(q.double(), k, v, lengths, block_table=table)
    for splits in (1, 2, 3, 9):
        monkeypatch.setattr(split_file, "num_splits", lambda programs, tiles, slots, splits=splits: splits)
        out = decode.triton_decode_attention(q, k.float(), v.float(), lengths, block_table=table)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_max_length_only_sizes_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def num_splits(programs: int, tiles: int, slots: int) -> int:
        counted.append(tiles)
        return tiles

    monkeypatch.setattr(split_file, "num_splits", num_splits)
    q, (k, v, _) = draw(1, 1, 2, 8).float(), caches(int32(90), 160, 2, 8, 0)
    found = [
        decode.triton_decode_attention(q, k.float(), v.float(), int32(90), max_length=max_length, window=window)
        for max_length, window in [(None, None), (90, None), (16, None), (None, 20), (None, 90)]
    ]
    assert counted == [10, 6, 1, 2, 6]  # tiles of 16 keys
    for index in (1, 2, 4):
        torch.testing.assert_close(found[index], found[0], rtol=0, atol=1e-6)


def test_keys_before_the_window_and_their_pages_are_not_read() -> None:
    lengths = int32(61, 40)
    q, (k, v, table) = draw(2, 2, 4, 16), caches(lengths, 64, 2, 16, 8)
    assert table is not None
    expected = decode.decode_attention(q, k, v, lengths, block_table=table, window=9)
    gone = torch.arange(0, 64, 8) + 7 <= lengths[:, None] - 2 - 9
    assert gone.sum() == 9
    nowhere = table.masked_fill(gone, int(k.isnan().all(dim=(1, 2, 3)).nonzero()[0]))
    out = decode.triton_decode_attention(q.float(), k.float(), v.float(), lengths, block_table=nowhere, window=9)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_non_contiguous_tensors() -> None:
    lengths = int32(30, 7)
    q, both = draw(2, 2, 4, 48)[..., 16:32].float(), draw(32, 2, 2, 2, 32).float().transpose(0, 1)
    k, v = both[:, :, 0, :, ::2], both[:, :, 1, :, 16:]
    expected = decode.decode_attention(q.double(), k.double(), v.double(), lengths)
    torch.testing.assert_close(decode.triton_decode_attention(q, k, v, lengths).double(), expected, rtol=0, atol=2e-6)
    # Pages of two layers in one pool, and a table that is a part of a wider one.
    pool, table = draw(5, 2, 8, 2, 16).float(), int32(3, 0, 4, 1, 2, 9, 9, 9).view(2, 4)[:, :2]
    k, v, lengths = pool[:, 0], pool[:, 1], int32(16, 13)
    table = table.clone().clamp_(max=4)
    wide = torch.full((4, 5), 7, dtype=torch.int32)
    wide[::2, 1::2] = table
    out = decode.triton_decode_attention(q, k, v, lengths, block_table=wide[::2, 1::2])
    expected = decode.decode_attention(q.double(), k.double(), v.double(), lengths, block_table=table)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_large_scores_stay_finite(equals_reference: EqualsReference) -> None:
    for options in ({}, {"softcap": 30.0}):
        hold(equals_reference, int32(40), 48, draw(1, 1, 4, 16) * 1e3, 2, torch.float32, **options)


APPENDING = {
    "lengths": ((5, 5), (16, 3), (1, 0)),
    "block_size": (0, 8),
    "dtype": (torch.float32, torch.float16),
}


@pytest.mark.parametrize("case", covering_array(APPENDING), ids=label)
def test_appending_equals_the_reference(case: dict[str, Any]) -> None:
    lengths, block_size, dtype = case["lengths"], case["block_size"], case["dtype"]
    packed = draw(2, 3, 4, 11).to(dtype)
    k, v = packed[:, :, :2, ::2], packed[:, :, 2:, 5:]  # 2 heads of 6: widths that fill no tile
    k_cache, v_cache, table = caches(int32(16, 16), 16, 2, 6, block_size)
    found, expected = ([x.to(dtype) for x in (k_cache, v_cache)] for _ in range(2))
    decode.triton_append_to_cache_(*found, k, v, int32(*lengths), block_table=table)
    decode.append_to_cache_(*expected, k, v, int32(*lengths), block_table=table)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_appending_to_a_part_of_a_cache() -> None:
    pool = draw(2, 2, 12, 3, 8).float()
    expected = pool.clone()
    k, v = draw(2, 1, 3, 8).float(), draw(2, 1, 3, 8, seed=9).float()
    decode.append_to_cache_(expected[:, 0], expected[:, 1, :, :, :], k, v, int32(4, 12))
    decode.triton_append_to_cache_(pool[:, 0], pool[:, 1], k, v, int32(4, 12))
    assert pool.equal(expected)
    decode.triton_append_to_cache_(pool[:, 0], pool[:, 1], k[:, :0], v[:, :0], int32(4, 12))
    assert pool.equal(expected)


@pytest.mark.parametrize("capacity", [64, 320])
def test_nan_in_a_key_that_is_seen_is_not_hidden_by_the_split(capacity: int) -> None:
    q, k, v = torch.ones(1, 1, 2, 16), torch.ones(1, capacity, 1, 16), torch.ones(1, capacity, 1, 16)
    k[0, 3, 0, 0] = torch.nan
    assert decode.triton_decode_attention(q, k, v, torch.tensor([capacity], dtype=torch.int32)).isnan().all()
