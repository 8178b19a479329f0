"""Functions of (seed, index) alone: a 64-bit mix, a closed-form permutation, the held-out split, hashes of positions.

No torch.
"""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

# Increment and multipliers of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014,
# figure 17).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
# A balanced Feistel network needs four rounds to look random to an observer who queries both directions (Luby, Rackoff
# 1988). Two more, because our domains can be as small as a few samples, where four rounds still favour some
# permutations.
_ROUNDS = 6
# Streams of the same seed must not share numbers.
_STREAM_SHUFFLE = 1
_STREAM_HELD_OUT = 2
_STREAM_POSITIONS = 3
_STREAM_SAMPLE = 4
_BLOCK = 1 << 16


def mix64(values: UInt64Array) -> UInt64Array:
    """Return the SplitMix64 output of each value, [n] uint64 -> [n] uint64. It is a bijection of 64-bit integers."""
    mixed = values + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
    return mixed ^ (mixed >> np.uint64(31))


def _keys(seed: int, stream: int, count: int) -> UInt64Array:
    """Return `count` round keys of (seed, stream), each mixed twice so that nearby seeds give unrelated keys."""
    root = mix64(np.array([seed % 2**64], dtype=np.uint64))
    stream_key = mix64(root ^ np.array([stream % 2**64], dtype=np.uint64))
    return mix64(stream_key ^ np.arange(count, dtype=np.uint64))


def permute(indices: Int64Array, size: int, seed: int, epoch: int) -> Int64Array:
    """Map indices of [0, size) through the permutation of this seed and epoch, each in constant time and memory.

    A Feistel network over the smallest even number of bits that holds `size`; values outside [0, size) are mapped again
    until they fall inside (cycle walking: Black, Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section
    4). The domain has at most four times `size` values, so at most four rounds of walking are expected, and no table of
    the epoch is stored.

    Args:
        indices: [n] int64, each in [0, size).
        size: number of elements, 1 <= size <= 2**62.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = _keys(seed, _STREAM_SHUFFLE + (epoch << 8), _ROUNDS)
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (mix64(right ^ key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def position_draws(samples: Int64Array, num_positions: int, seed: int, purpose: int) -> UInt64Array:
    """Return [n, num_positions] uint64, a hash of (seed, sample number, position) for each position of each sample.

    Args:
        samples: [n] int64, not negative.
        purpose: hashes of different purposes are independent; in [0, 256).
    """
    key = _keys(seed, _STREAM_POSITIONS, purpose + 1)[purpose]
    rows = mix64(samples.astype(np.uint64) ^ key)
    return mix64(rows[:, None] ^ np.arange(num_positions, dtype=np.uint64))


def _draws(count: int, seed: int, stream: int) -> npt.NDArray[np.float64]:
    """Return [count] numbers in [0, 1]: hashes of (seed, index)."""
    draws, key = np.empty(count), _keys(seed, stream, 1)
    for start in range(0, count, _BLOCK):
        indices = np.arange(start, min(start + _BLOCK, count), dtype=np.uint64)
        draws[start : start + _BLOCK] = mix64(indices ^ key).astype(np.float64) / 2.0**64
    return draws


def sample_units(sizes: Int64Array, num_characters: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return [n] bool: True for the units with the smallest hashes of (seed, index), up to `num_characters` in all.

    At least one unit is chosen.

    Args:
        sizes: [n] int64, characters of each unit.
    """
    order = _draws(len(sizes), seed, _STREAM_SAMPLE).argsort(kind="stable")
    count = max(1, int(np.searchsorted(sizes[order].cumsum(), num_characters, side="right")))
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def held_out_units(sizes: Int64Array, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return [n] bool: True for held-out units, those whose hash of (seed, unit index) is below `fraction`.

    Where few units make the share of the text differ from the fraction by more than half of it, those with the smallest
    hashes are held out, as many as come nearest to the fraction. With a fraction above 0 and at least two units both
    splits get at least one.

    Args:
        sizes: [n] int64, characters of each unit.
    """
    if fraction == 0 or len(sizes) < 2:
        return np.zeros(len(sizes), dtype=bool)
    draws = _draws(len(sizes), seed, _STREAM_HELD_OUT)
    chosen = np.asarray(draws < fraction)
    wanted = fraction * sizes.sum()
    if abs(sizes[chosen].sum() - wanted) > wanted / 2 or chosen.all():
        order = draws.argsort(kind="stable")
        count = 1 + int(np.abs(sizes[order].cumsum() - wanted).argmin())
        chosen[:] = False
        chosen[order[: min(count, len(sizes) - 1)]] = True
    return chosen
