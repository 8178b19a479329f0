"""Counter-based random numbers: Random123's test vectors, the same numbers at every cut, the promised distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimaran.kernels.random import (
    fill_normal_,
    keep_arguments,
    keep_mask,
    keep_threshold,
    philox,
    random_words,
    stream_key,
)

Words = tuple[int, int, int, int]
MASK = 0xFFFFFFFF


def philox_reference(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 in Python integers, as Salmon et al. (2011, section 3.3) and Random123's philox.h write it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product_1 >> 32) ^ c1 ^ k0, product_1 & MASK, (product_0 >> 32) ^ c3 ^ k1, product_0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


# Random123, tests/kat_vectors, lines "philox4x32 10": zeros, ones, and the digits of pi.
KNOWN_ANSWERS: list[tuple[Words, tuple[int, int], Words]] = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK, MASK, MASK, MASK), (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(
    shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, seed: int = 1, name: str = "w", std: float = 1.0
) -> Tensor:
    """The whole tensor `name`."""
    out = torch.full(shape, torch.nan, dtype=dtype)
    fill_normal_(out, seed=seed, name=name, global_shape=shape, dim=None, offset=0, std=std)
    return out


def draw_box(shape: tuple[int, ...], dim: int, offset: int, length: int, out: Tensor | None = None) -> Tensor:
    """The part [offset, offset + length) of the tensor along `dim`."""
    if out is None:
        out = torch.full((*shape[:dim], length, *shape[dim + 1 :]), torch.nan)
    fill_normal_(out, seed=1, name="w", global_shape=shape, dim=dim, offset=offset, std=1.0)
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_published_answers(counter: Words, key: tuple[int, int], expected: Words) -> None:
    assert philox_reference(counter, key) == expected


def test_philox_gives_the_published_answer_of_counter_and_key_zero() -> None:
    words = philox(torch.zeros((), dtype=torch.int64), (0, 0))
    assert tuple(int(word) for word in words) == KNOWN_ANSWERS[0][2]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**63 - 1), st.tuples(st.integers(0, MASK), st.integers(0, MASK)))
def test_philox_equals_the_reference_for_any_64_bit_counter_and_key(counter: int, key: tuple[int, int]) -> None:
    expected = philox_reference((counter & MASK, counter >> 32, 0, 0), key)
    assert tuple(int(word) for word in philox(torch.tensor(counter), key)) == expected


@pytest.mark.parametrize("num_cols", [1, 3, 4, 7, 257])
def test_random_words_are_the_documented_word_of_the_documented_block(num_cols: int) -> None:
    key, rows = stream_key(5, "mask"), torch.tensor([9, 0, 2**33])
    words = random_words(key, rows, num_cols)
    blocks = -(-num_cols // 4)
    for i, row in enumerate(rows.tolist()):
        for col in {0, num_cols // 2, num_cols - 1}:
            counter = row * blocks + col // 4
            assert words[i, col] == philox_reference((counter & MASK, counter >> 32, 0, 0), key)[col % 4]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_words_of_any_columns_are_the_columns_of_all(data: st.DataObject) -> None:
    num_cols = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, num_cols))
    stop = data.draw(st.integers(first, num_cols))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 1000), max_size=6)), dtype=torch.int64)
    key = stream_key(1, "columns")
    assert random_words(key, rows, num_cols, first, stop).equal(random_words(key, rows, num_cols)[:, first:stop])


def test_random_words_do_not_depend_on_how_many_rows_are_drawn_together() -> None:
    key, num_cols = stream_key(1, "chunks"), 1 << 10
    many = random_words(key, torch.arange(300), num_cols)  # 300 x 256 blocks: more than one chunk of 32768
    for row in (0, 127, 128, 255, 256, 299):
        assert random_words(key, torch.tensor([row]), num_cols).squeeze(0).equal(many[row])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_a_box_of_any_cut_is_that_slice_of_the_whole_tensor(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    offset = data.draw(st.integers(0, shape[dim] + 2))
    length = data.draw(st.integers(0, shape[dim] + 3))
    part = draw_box(shape, dim, offset, length)
    real = max(0, min(length, shape[dim] - offset))
    assert part.narrow(dim, 0, real).equal(draw(shape).narrow(dim, min(offset, shape[dim]), real))
    padding = part.narrow(dim, real, length - real)
    assert padding.equal(torch.zeros_like(padding)), "what lies past the global tensor is zero"


@pytest.mark.parametrize("cols", [1, 2, 5, 63, 4096])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_along_the_last_dim_join_to_the_whole(cols: int, parts: int) -> None:
    length = -(-cols // parts)
    joined = torch.cat([draw_box((6, cols), 1, i * length, length) for i in range(parts)], dim=1)
    assert joined[:, :cols].equal(draw((6, cols)))
    assert not joined[:, cols:].any()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_non_contiguous_shard_is_filled_like_a_contiguous_one(dim: int) -> None:
    shape = (4, 6, 10)
    local = list(shape)
    local[dim] //= 2
    out = torch.full((local[2], local[1], local[0]), torch.nan).permute(2, 1, 0)
    assert not out.is_contiguous()
    offset = shape[dim] // 2
    assert draw_box(shape, dim, offset, local[dim], out).equal(draw(shape).narrow(dim, offset, local[dim]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_dtype_starts_from_the_same_float32_values(dtype: torch.dtype) -> None:
    assert draw((17, 33), dtype=dtype, std=0.02).equal(draw((17, 33), std=0.02).to(dtype))


def test_an_empty_tensor_and_a_shard_of_padding_alone_are_allowed() -> None:
    assert draw((0, 4)).shape == (0, 4)
    assert draw_box((5, 4), 0, 8, 2).equal(torch.zeros(2, 4))
    assert draw_box((5, 4), 0, 5, 0).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "dim", "length"), [((1 << 20, 1 << 16), 0, 2), ((8, 1 << 40), 1, 6), ((3, 1 << 18, 1 << 14), 1, 5)]
)
def test_a_shard_costs_its_own_size_and_not_that_of_the_tensor(shape: tuple[int, ...], dim: int, length: int) -> None:
    # The whole tensors have 2**33 to 2**43 elements: drawing all of one would not come to an end.
    offset = shape[dim] - length
    with torch.profiler.profile(profile_memory=True) as profile:
        part = draw_box(shape, dim, offset, length)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    row_indices = 8 * math.prod(shape[:-1])
    assert largest <= row_indices + 300 * max(part.numel(), 1)
    assert part.isfinite().all()
    assert part.count_nonzero() == part.numel()


def test_moments_are_those_of_the_normal_distribution() -> None:
    n = 1_000_000
    sample = draw((1000, 1000)).double().flatten()
    # Five standard errors each: 1, sqrt(2), sqrt(6) and sqrt(24) over sqrt(n) for mean, deviation^2, skewness and
    # excess kurtosis.
    assert abs(sample.mean()) < 5 / math.sqrt(n)
    assert abs(sample.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(sample.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(sample.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("std", [1.0, 0.02])
def test_kolmogorov_smirnov_accepts_the_normal_distribution(std: float) -> None:
    sample = draw((500, 999), std=std).double().flatten().sort().values / std
    n = len(sample)
    cdf = torch.special.ndtr(sample)
    steps = torch.arange(1, n + 1) / n
    statistic = torch.maximum((steps - cdf).max(), (cdf - (steps - 1 / n)).max())
    # P(sqrt(n) D > 1.95) = 0.001 (Kolmogorov's limit distribution); a std off by 1% would give sqrt(n) D of 1.7 on top.
    assert statistic * math.sqrt(n) < 1.95


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"name": "layers.0.mlp.up.weight"}, {"name": "layers.1.mlp.up.weight"}),
        ({"seed": 1}, {"seed": 2}),
        ({"seed": 1, "name": "11"}, {"seed": 11, "name": "1"}),
        ({"seed": 0}, {"seed": -1}),
    ],
)
def test_names_and_seeds_give_independent_streams(first: dict[str, object], second: dict[str, object]) -> None:
    a, b = draw((400, 500), **first).flatten(), draw((400, 500), **second).flatten()  # type: ignore[arg-type]
    correlation = (a * b).double().mean()
    assert abs(correlation) < 5 / math.sqrt(len(a))
    assert (a == b).double().mean() < 1e-4


def test_neighbouring_elements_are_independent() -> None:
    sample = draw((500, 1000)).double()
    for shifted in (
        sample[:, 1:] * sample[:, :-1],
        sample[1:] * sample[:-1],
        sample[:, 0::2].square() * sample[:, 1::2].square() - 1,
    ):
        assert abs(shifted.mean()) < 5 * shifted.std() / math.sqrt(shifted.numel())


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999])
def test_keep_mask_drops_at_the_rate(rate: float) -> None:
    mask = keep_mask(stream_key(3, "mask"), torch.arange(700), 901, rate)
    assert mask.dtype == torch.bool
    n = mask.numel()
    assert abs((~mask).double().mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / n)


def test_keep_masks_are_nested() -> None:
    low, high = (keep_mask(stream_key(3, "mask"), torch.arange(50), 60, rate) for rate in (0.2, 0.6))
    assert (low | ~high).all(), "what survives a high rate survives a low one: the same number is compared"


@pytest.mark.parametrize("rate", [0.0, 2.0**-33, 1e-9, 0.5, 1 - 2.0**-33, 1 - 2.0**-53])
def test_the_threshold_is_the_rounded_rate_and_fits_a_word(rate: float) -> None:
    assert keep_threshold(rate) == min(round(rate * 2**32), MASK)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.tuples(st.integers(0, MASK), st.integers(0, MASK)), st.floats(0, 1, exclude_max=True))
def test_kernel_arguments_are_signed_words_of_the_same_bits(key: tuple[int, int], rate: float) -> None:
    words = keep_arguments(key, rate)
    assert all(-(2**31) <= word < 2**31 for word in words)
    assert tuple(word & MASK for word in words) == (*key, keep_threshold(rate))
