"""A checkpoint written at any layout reads at any other, bit for bit, and reads no more than it is asked for."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.runtime.checkpoint.checkpoint_ranks import Layout, cut, lines_without_this_package, save_ranks, shard_of
from trimaran.models.parallel.shard import Shape, ShardPiece, ShardSpec, num_elements, whole
from trimaran.runtime.checkpoint.boxes import (
    first_overlap,
    flat_boxes,
    flat_index,
    global_boxes,
    missing_ranges,
    trim_padding,
    volume,
)
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.checkpoint.store import save

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, shape: Shape) -> Layout:
    dims = [None, *range(len(shape))]
    cuts = draw(st.lists(st.floats(0, 1), max_size=2))
    return Layout(draw(st.sampled_from(dims)), draw(st.integers(1, 4)), tuple(cuts))


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[Tensor, Layout, Layout]:
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        draw(layouts(shape)),
        draw(layouts(shape)),
    )


def distinct(pieces: list[list[ShardPiece]]) -> bool:
    """No rank holds two shards of a tensor at the same start, as no rank of a mesh does."""
    return all(len({(p.name, p.key, p.start) for p in mine}) == len(mine) for mine in pieces)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(stored_tensors(), min_size=1, max_size=3), st.data())
def test_saved_at_any_layout_it_loads_at_any_other_bit_for_bit(
    drawn: list[tuple[Tensor, Layout, Layout]], data: st.DataObject
) -> None:
    tensors = {(f"layers.{i}.weight", "exp_avg"): (tensor, written) for i, (tensor, written, _) in enumerate(drawn)}
    with tempfile.TemporaryDirectory() as folder:
        pieces = cut(tensors, world_size=4)
        assert distinct(pieces)
        results = save_ranks(Path(folder), 7, pieces)
        assert results == [Path(folder) / "step-00000007"] * 4
        checkpoint = Checkpoint.open(results[0])
        assert checkpoint.names() == sorted(name for name, _ in tensors)
        for (name, key), (tensor, _, read) in zip(tensors, drawn, strict=True):
            assert torch.equal(checkpoint.read_global(name, key), tensor)
            for spec, local_shape in read.shards(tensor.shape):
                truth = shard_of(tensor, spec, local_shape)
                shard = checkpoint.read(name, key, spec, local_shape)
                assert shard.dtype == tensor.dtype
                assert torch.equal(shard, truth)
                start = data.draw(st.integers(0, num_elements(local_shape)))
                stop = data.draw(st.integers(start, num_elements(local_shape)))
                part = checkpoint.read_range(name, key, spec, local_shape, start, stop)
                assert torch.equal(part, truth.reshape(-1)[start:stop])


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(stored_tensors(), min_size=1, max_size=3))
def test_the_lines_of_the_page_open_a_checkpoint_of_any_layout(drawn: list[tuple[Tensor, Layout, Layout]]) -> None:
    tensors = {
        (f"layers.{i}.w", "exp_avg"): (tensor if tensor.dtype != torch.bfloat16 else tensor.float(), layout)
        for i, (tensor, layout, _) in enumerate(drawn)
    }
    with tempfile.TemporaryDirectory() as folder:
        (path, *_) = save_ranks(Path(folder), 7, cut(tensors, world_size=4))
        names: dict[str, Any] = {}
        exec(lines_without_this_package(path, "exp_avg"), names)  # noqa: S102
    found = names["exp_avgs"]
    assert found.keys() == {name for name, _ in tensors}
    for (name, _), (tensor, _) in tensors.items():
        assert torch.equal(torch.from_numpy(np.asarray(found[name])), tensor), name


@settings(max_examples=200)
@given(SHAPES, st.data())
def test_the_boxes_of_a_flat_range_hold_exactly_its_elements_and_are_few(shape: Shape, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_elements(shape)))
    stop = data.draw(st.integers(start, num_elements(shape)))
    boxes = flat_boxes(shape, start, stop)
    marks = torch.zeros(shape, dtype=torch.int64)
    for box in boxes:
        marks[tuple(slice(low, high) for low, high in box)] += 1
    assert marks.reshape(-1).tolist() == [int(start <= i < stop) for i in range(num_elements(shape))]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert sum(volume(box) for box in boxes) == stop - start
    if boxes:
        assert flat_index([low for low, _ in boxes[0]], shape) == start


@settings(max_examples=200)
@given(st.lists(st.tuples(*[st.tuples(st.integers(0, 6), st.integers(1, 4))] * 2), max_size=6))
def test_overlapping_boxes_are_found_and_only_those(sides: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    boxes = [tuple((low, low + length) for low, length in side) for side in sides]
    cells = [{(i, j) for i in range(*box[0]) for j in range(*box[1])} for box in boxes]
    overlapping = {(i, j) for i in range(len(boxes)) for j in range(i + 1, len(boxes)) if cells[i] & cells[j]}
    found = first_overlap(boxes)
    assert found in overlapping if overlapping else found is None


def test_two_owners_of_a_scalar_overlap() -> None:
    assert first_overlap([()]) is None
    assert first_overlap([(), ()]) == (0, 1)


def test_padding_is_trimmed_at_the_ends_and_named_missing_ranges_leave_it_out() -> None:
    spec = ShardSpec("tp", 0, (5, 3), 4)  # local rows 4 and 5; row 5 is padding
    assert trim_padding(spec, (2, 3), 0, 6) == (0, 3)
    assert trim_padding(spec, (2, 3), 3, 6) == (3, 3)
    held = global_boxes(spec, (2, 3), 1, 2)
    assert missing_ranges(spec, (2, 3), 0, 6, held) == [(0, 1), (2, 3)]


def test_padded_rows_are_not_stored_and_load_as_zeros(tmp_path: Path) -> None:
    embedding = torch.randn(10, 4)
    path = save_ranks(tmp_path, 1, cut({("embedding.weight", "weight"): (embedding, Layout(0, 4))}, 4))[0]
    stored = sum(tensor.numel() for file in path.glob("*.safetensors") for tensor in load_file(file).values())
    assert stored == embedding.numel()
    spec = ShardSpec("tp", 0, (10, 4), 9)
    shard = Checkpoint.open(path).read("embedding.weight", "weight", spec, (3, 4))
    assert torch.equal(shard, torch.cat([embedding[9:], torch.zeros(2, 4)]))


def test_a_rank_that_owns_nothing_writes_no_file(tmp_path: Path) -> None:
    path = save_ranks(tmp_path, 1, cut({("w", "weight"): (torch.randn(3), Layout(None, 1))}, 2))[0]
    assert Checkpoint.open(path).files == ["rank-00000.safetensors"]
    assert Checkpoint.open(path).world_size == 2


def test_files_are_plain_safetensors_with_readable_keys(tmp_path: Path) -> None:
    weight, moments = torch.randn(4, 3, dtype=torch.bfloat16), torch.randn(4, 3, dtype=torch.float64)
    tensors = {
        ("a.weight", "weight"): (weight, Layout(None, 1)),
        ("a.weight", "exp_avg"): (moments, Layout(None, 1, (0.5,))),
    }
    path = save(tmp_path, 2, [piece for rank in cut(tensors, 2) for piece in rank], {})
    loaded = load_file(path / "rank-00000.safetensors")
    assert sorted(loaded) == ["exp_avg|a.weight|0", "exp_avg|a.weight|6", "weight|a.weight|0"]
    assert torch.equal(loaded["weight|a.weight|0"], weight.reshape(-1))
    assert torch.equal(loaded["exp_avg|a.weight|6"], moments.reshape(-1)[6:])


def test_the_dtype_is_converted_when_asked(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    path = save(tmp_path, 1, cut({("w", "weight"): (weight, Layout(1, 1))}, 1)[0], {})
    read = Checkpoint.open(path).read_global("w", "weight", dtype=torch.bfloat16)
    assert torch.equal(read, weight.to(torch.bfloat16))


def test_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        "tokens_seen": 2**53 + 1,
        "lr": 0.1 + 0.2,
        "spec": {"model": {"preset": None}, "data": {"source": ["ä.txt"]}},
        "done": False,
    }
    checkpoint = Checkpoint.open(save(tmp_path, 3, [], state))
    assert checkpoint.step == 3
    assert checkpoint.state == state


def test_reading_part_of_a_tensor_allocates_that_part_only(tmp_path: Path) -> None:
    big = torch.zeros(2048, 1024)  # 8 MiB
    path = save(tmp_path, 1, [ShardPiece("w", "weight", big.view(-1), whole(big.shape), (2048, 1024), 0)], {})
    checkpoint = Checkpoint.open(path, verify=False)
    spec, local_shape = Layout(1, 8).shards(big.shape)[3]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        checkpoint.read("w", "weight", spec, local_shape)
    # Operators alone: "[memory]" is the file being mapped, which takes address space and no memory.
    allocated = sum(
        max(0, event.self_cpu_memory_usage) for event in profiler.key_averages() if event.key.startswith("aten::")
    )
    assert 0 < allocated <= big.numel() * 4 / 8 + 4096


def test_what_the_checkpoint_does_not_hold_is_refused_in_words(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        save(tmp_path, 1, cut({("layers.0.w", "weight"): (torch.randn(4, 2), Layout(0, 1))}, 1)[0], {})
    )
    with pytest.raises(CheckpointError, match=r"no 'weight' of 'layers.1.w'; the nearest name it has is 'layers.0.w'"):
        checkpoint.read_global("layers.1.w", "weight")
    with pytest.raises(CheckpointError, match=r"no 'exp_avg' of 'layers.0.w'; it has \['weight'\] of it"):
        checkpoint.read_global("layers.0.w", "exp_avg")
    with pytest.raises(CheckpointError, match=r"has global shape \(4, 2\) in step-00000001 but \(4, 3\) in this run"):
        checkpoint.read("layers.0.w", "weight", whole((4, 3)), (4, 3))
    with pytest.raises(ValueError, match=r"range \[0, 9\) does not fit"):
        checkpoint.read_range("layers.0.w", "weight", whole((4, 2)), (4, 2), 0, 9)


def test_pieces_that_do_not_cover_the_shard_are_named_as_missing_ranges(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        1,
        [piece for rank in cut({("w", "weight"): (torch.randn(4, 2), Layout(0, 1, (0.25, 0.5)))}, 3) for piece in rank],
        {},
    )
    checkpoint = Checkpoint.open(path)
    # Saving refuses holes, so one is made in the reader: the piece of elements 2 and 3 is taken away.
    (tensor,) = checkpoint._tensors.values()
    kept = [index for index, start in enumerate(tensor.start) if start != 2]
    columns = ("file", "dim", "offset", "local_length", "start", "length")
    fewer = {name: tuple(getattr(tensor, name)[index] for index in kept) for name in columns}
    checkpoint._tensors["w", "weight"] = tensor.model_copy(update=fewer)
    with pytest.raises(CheckpointError, match=r"does not hold all of 'weight' of 'w'.*missing: \[2, 4\)"):
        checkpoint.read_global("w", "weight")
    assert checkpoint.read_range("w", "weight", whole((4, 2)), (4, 2), 4, 8).shape == (4,)
