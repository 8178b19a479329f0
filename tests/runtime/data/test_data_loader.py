"""The loader is a pure function of the position: resume, dp size, epochs, and the permutation behind it."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimaran.models.batch import Microbatch
from trimaran.models.parallel.group import Group
from trimaran.runtime.data.files import DataError
from trimaran.runtime.data.permutation import held_out_units, permute
from trimaran.runtime.data.prepare import prepare_data
from trimaran.runtime.data.samples.loader import Loader
from trimaran.runtime.data.tokens.shards import ShardWriter, TokenShards
from trimaran.runtime.spec import parse_spec
from trimaran.runtime.train.feed import BatchFeed
from trimaran.runtime.train.samples import check_data, held_out_batches

SEQ_LEN = 5


def make_shards(folder: Path, num_tokens: int, tokens_per_shard: int = 1 << 20, split: str = "train") -> TokenShards:
    """Token i is i, so that a sample shows the window it came from."""
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, split, "uint32", tokens_per_shard) as writer:
        writer.write(np.arange(num_tokens))
        return TokenShards(folder, split, "uint32", writer.close())


def make_loader(
    shards: TokenShards,
    *,
    gbs: int = 8,
    mbs: int = 2,
    dp_rank: int = 0,
    dp_size: int = 1,
    seed: int = 1,
    shuffle: bool = True,
) -> Loader:
    return Loader(
        shards,
        seq_len=SEQ_LEN,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=seed,
        shuffle=shuffle,
    )


def windows(microbatches: list[Microbatch]) -> list[int]:
    return [int(row[0]) // SEQ_LEN for microbatch in microbatches for row in microbatch.tokens]


def same(left: list[Microbatch], right: list[Microbatch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.first_sample == b.first_sample
        for a, b in pairs
    )


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**9))
def test_permute_is_a_permutation_of_any_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_permute_works_on_part_of_a_huge_epoch_without_a_table() -> None:
    size = 10**15
    indices = np.array([0, 1, size - 1, 123_456_789_012])
    once = permute(indices, size, 3, 7)
    assert len(set(once.tolist())) == 4
    assert ((once >= 0) & (once < size)).all()
    assert permute(indices[2:3], size, 3, 7).tolist() == [once[2]]


def test_permute_looks_random() -> None:
    size = 20_000
    moved = permute(np.arange(size), size, 5, 0)
    # Mean displacement of a uniform permutation is size / 3, with a standard error near size / (4 * sqrt(size)); five
    # of them allowed.
    assert abs(np.abs(moved - np.arange(size)).mean() - size / 3) < 5 * size / (4 * np.sqrt(size))
    # As many neighbours stay neighbours as chance allows (2 on average).
    assert (np.abs(np.diff(moved)) == 1).sum() < 15
    assert (permute(np.arange(size), size, 6, 0) == moved).mean() < 0.01


def test_small_epochs_take_every_order() -> None:
    orders = {tuple(permute(np.arange(4), 4, seed, 0).tolist()) for seed in range(600)}
    # A Feistel network gives even permutations only when a half has two bits or more; four elements have one-bit
    # halves.
    assert len(orders) >= 12


def test_a_sample_is_a_window_and_its_labels_are_the_next_tokens(tmp_path: Path) -> None:
    (microbatch,) = make_loader(make_shards(tmp_path, 16), gbs=3, mbs=3, shuffle=False).microbatches(0)
    assert microbatch.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert torch.equal(microbatch.labels, microbatch.tokens + 1)
    for tensor in (microbatch.tokens, microbatch.labels):
        assert tensor.dtype is torch.int64
        assert tensor.is_contiguous()


def test_windows_cross_file_borders(tmp_path: Path) -> None:
    whole, cut = make_shards(tmp_path / "whole", 101), make_shards(tmp_path / "cut", 101, tokens_per_shard=7)
    assert same(make_loader(whole).microbatches(5), make_loader(cut).microbatches(5))


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    loader = make_loader(make_shards(tmp_path, 24 * SEQ_LEN + 1 + 3))
    assert (loader.num_samples, loader.unused_tail_tokens) == (24, 3)
    first, second = (
        [index for step in (0, 8, 16) for index in windows(loader.microbatches(epoch * 24 + step))] for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != list(range(24))


def test_a_batch_may_cross_epochs_even_several(tmp_path: Path) -> None:
    loader = make_loader(make_shards(tmp_path, 3 * SEQ_LEN + 1), gbs=12, mbs=4)
    seen = windows(loader.microbatches(0))
    assert [sorted(seen[start : start + 3]) for start in (0, 3, 6, 9)] == [[0, 1, 2]] * 4
    assert windows(loader.microbatches(4))[:8] == seen[4:]


@pytest.mark.parametrize(("dp_size", "mbs"), [(1, 1), (2, 2), (4, 1), (8, 1), (2, 4)])
def test_any_dp_size_sees_the_same_samples_in_a_global_step(tmp_path: Path, dp_size: int, mbs: int) -> None:
    shards = make_shards(tmp_path, 30 * SEQ_LEN + 1)
    alone = windows(make_loader(shards, mbs=8).microbatches(24))
    ranks = [make_loader(shards, mbs=mbs, dp_rank=rank, dp_size=dp_size).microbatches(24) for rank in range(dp_size)]
    assert [index for microbatches in ranks for index in windows(microbatches)] == alone
    firsts = [microbatch.first_sample for microbatches in ranks for microbatch in microbatches]
    assert firsts == list(range(24, 32, mbs))


def test_resuming_at_any_position_is_identical(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 30 * SEQ_LEN + 1)
    unbroken = make_loader(shards)
    steps = [unbroken.microbatches(consumed) for consumed in range(0, 80, 8)]
    for step in reversed(range(10)):
        assert same(make_loader(shards).microbatches(8 * step), steps[step])


def test_another_batch_size_continues_the_same_order(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 30 * SEQ_LEN + 1)
    small = windows(make_loader(shards, gbs=4).microbatches(8)) + windows(make_loader(shards, gbs=4).microbatches(12))
    assert small == windows(make_loader(shards, gbs=8).microbatches(8))


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 100 * SEQ_LEN + 1)
    assert windows(make_loader(shards, seed=1).microbatches(0)) != windows(make_loader(shards, seed=2).microbatches(0))


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"gbs": 6, "mbs": 4},
            r"global_batch_size \(6\) must be a positive multiple of dp x train.micro_batch_size \(1 x 4\)",
        ),
        ({"gbs": 0}, r"global_batch_size \(0\)"),
        ({"mbs": 0}, r"micro_batch_size \(0\) must be at least 1"),
        ({"dp_rank": 2, "dp_size": 2}, r"dp rank 2 must be in \[0, 2\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path: Path, sizes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_loader(make_shards(tmp_path, 100), **sizes)


@pytest.mark.parametrize("num_tokens", [0, 1, SEQ_LEN])
def test_a_split_shorter_than_one_sample_is_refused_with_the_remedy(tmp_path: Path, num_tokens: int) -> None:
    with pytest.raises(
        DataError, match=rf"'train' has {num_tokens} tokens, one sample of train.seq_len \(5\) needs 6; add text"
    ):
        make_loader(make_shards(tmp_path, num_tokens))
    with pytest.raises(DataError, match=r"raise data\.held_out_fraction"):
        make_loader(make_shards(tmp_path, num_tokens, split="held_out"))
    assert make_loader(make_shards(tmp_path, SEQ_LEN + 1)).num_samples == 1


def test_held_out_text_shorter_than_a_batch_is_repeated_to_fill_one_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "".join(f"Line {index} of a text.\n" for index in range(400))
    (tmp_path / "a.txt").write_text(text)
    spec = parse_spec(
        {
            "model": {"num_layers": 1, "hidden_size": 8, "num_heads": 1},
            "data": {
                "source": [str(tmp_path / "a.txt")],
                "cache_dir": str(tmp_path / "c"),
                "tokenizer_vocab_size": 300,
            },
            "optimizer": {"lr": 1e-3},
            "train": {
                "num_steps": 1,
                "global_batch_size": 64,
                "micro_batch_size": 4,
                "seq_len": 16,
                "eval_interval": 1,
            },
            "parallel": {"dp": 2},
        }
    )
    data = prepare_data(spec)
    check_data(spec, data)
    samples = (data.held_out.num_tokens - 1) // 16
    assert f"the held-out text has {samples} samples" in caplog.text
    batches = [held_out_batches(spec, data, Group("dp", (0, 1), rank)) for rank in (0, 1)]
    rows = [row.tolist() for ((*microbatches,),) in batches for microbatch in microbatches for row in microbatch.tokens]
    assert len(rows) == 64
    assert rows == [data.held_out.read(sample % samples * 16, 16).tolist() for sample in range(64)]


def test_a_microbatch_costs_well_under_a_step(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, 2_000_000)
    loader = Loader(shards, seq_len=512, global_batch_size=64, micro_batch_size=4, dp_rank=0, dp_size=1, seed=1)
    loader.microbatches(0)
    start = time.process_time()
    for step in range(10):
        loader.microbatches(64 * step)
    # A few hundred microseconds of this process's own time.
    assert (time.process_time() - start) / 160 < 0.005


def test_the_held_out_share_follows_the_fraction_and_the_seed() -> None:
    sizes = np.full(30_000, 7)
    chosen = held_out_units(sizes[:20_000], 0.1, 1)
    # Binomial: standard deviation sqrt(20000 * 0.1 * 0.9) = 42; five of them allowed.
    assert abs(int(chosen.sum()) - 2000) < 212
    assert (held_out_units(sizes[:20_000], 0.1, 1) == chosen).all()
    assert (held_out_units(sizes[:20_000], 0.1, 2) != chosen).any()
    # A longer corpus keeps the choice for the units it had.
    assert (held_out_units(sizes, 0.1, 1)[:20_000] == chosen).all()


@given(sizes=st.lists(st.integers(1, 9), max_size=80), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 2**63))
def test_few_units_give_about_the_fraction_and_both_splits_get_one(
    sizes: list[int], fraction: float, seed: int
) -> None:
    chosen = held_out_units(np.array(sizes, dtype=np.int64), fraction, seed)
    assert not held_out_units(np.array(sizes, dtype=np.int64), 0.0, seed).any()
    if len(sizes) < 2:
        assert not chosen.any()
    else:
        assert 1 <= chosen.sum() < len(sizes)
        wanted = fraction * sum(sizes)
        assert abs(np.array(sizes)[chosen].sum() - wanted) <= max(wanted / 2, max(sizes))


class Reads:
    """Stands for a loader: notes which thread reads which position, and fails where it is told to."""

    def __init__(self, fails_at: int = -1) -> None:
        self.threads: dict[int, threading.Thread] = {}
        self._fails_at, self._read = fails_at, {position: threading.Event() for position in range(0, 64, 4)}

    def __call__(self, position: int) -> list[Microbatch]:
        self.threads[position] = threading.current_thread()
        self._read[position].set()
        if position == self._fails_at:
            raise DataError("a shard is gone")
        return [Microbatch(torch.tensor([[position]]), torch.zeros(1, 1), position)]

    def wait_for(self, position: int) -> None:
        assert self._read[position].wait(60)


@pytest.fixture
def pinned_batches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets a machine without a GPU take a feed for one; the devices that threads have chosen."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(Microbatch, "pin", lambda self: Microbatch(-self.tokens, self.labels, self.first_sample))
    return chosen


def test_a_gpu_gets_the_batches_of_each_step_pinned_and_the_next_ones_are_read_meanwhile(
    pinned_batches: list[Any],
) -> None:
    read, gpu = Reads(), torch.device("cuda", 3)
    feed = BatchFeed(read, 4, gpu)
    for position in (0, 4, 8, 40, 44):  # 40: as after a resume
        (batch,) = feed.at(position)
        assert batch.tokens.item() == -position
        read.wait_for(position + 4)  # before anything asks for it
    feed.close()
    assert threading.current_thread() not in read.threads.values()
    assert pinned_batches == [gpu]


def test_what_can_not_be_read_is_told_in_the_step_that_needs_it(pinned_batches: list[Any]) -> None:
    feed = BatchFeed(Reads(fails_at=8), 4, torch.device("cuda", 0))
    assert [feed.at(position)[0].first_sample for position in (0, 4)] == [0, 4]
    with pytest.raises(DataError, match="a shard is gone"):
        feed.at(8)
    feed.close()


def test_a_cpu_reads_each_batch_when_it_is_needed() -> None:
    read = Reads()
    assert BatchFeed(read, 4, torch.device("cpu")).at(8)[0].tokens.item() == 8
    assert read.threads == {8: threading.current_thread()}
