"""Faults around a checkpoint: damage, full disks, kills, ranks that disagree. Nothing is lost, everything is named."""

import ast
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trimaran.runtime.checkpoint as room
from tests.runtime.checkpoint.checkpoint_ranks import Layout, ThreadGather, cut, run_ranks, save_ranks
from trimaran.models.parallel.shard import ShardPiece, ShardSpec, whole
from trimaran.runtime.checkpoint.folder import find_checkpoints, latest, list_checkpoints
from trimaran.runtime.checkpoint.manifest import CheckpointError
from trimaran.runtime.checkpoint.reshard import Checkpoint
from trimaran.runtime.checkpoint.store import save
from trimaran.runtime.train.state import read_state, spec_of

TENSOR = torch.arange(24, dtype=torch.float32).view(6, 4)


def pieces_of(value: float, world_size: int = 2) -> list[list[ShardPiece]]:
    """One tensor cut over the ranks, every element moved by `value`: a checkpoint shows which save it came from."""
    return cut({("w", "weight"): (TENSOR + value, Layout(0, world_size))}, world_size)


def save_step(folder: Path, step: int, keep_last: int = 0) -> Path:
    """Save one checkpoint whose tensor is TENSOR + step."""
    results = save_ranks(folder, step, pieces_of(step), {"tokens_seen": step}, keep_last=keep_last)
    assert results == [folder / f"step-{step:08d}"] * 2
    return folder / f"step-{step:08d}"


def held_value(path: Path) -> float:
    """Which save a checkpoint came from; verifies every byte on the way."""
    return float(Checkpoint.open(path).read_global("w", "weight")[0, 0])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool) -> None:
    """Change the manifest; with `sign` its own digest is made right again, as a forger would."""
    body = json.loads((path / "manifest.json").read_text())
    change(body)
    if sign:
        body.pop("manifest_sha256")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        body["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body))


# --- damage ---------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_named_by_file_and_step_with_the_older_checkpoint_to_use(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    path = save_step(tmp_path, 2)
    flip_byte(path / "rank-00001.safetensors", -3)
    message = (
        r"rank-00001.safetensors of checkpoint step-00000002 \(step 2\) is broken: sha256 .*"
        r"is step-00000001; move step-00000002 out of .* resumes from step 1"
    )
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(path)


def test_ranks_can_share_the_verification(tmp_path: Path) -> None:
    path = save_step(tmp_path, 2)
    flip_byte(path / "rank-00001.safetensors", -3)
    checkpoint = Checkpoint.open(path, verify=False)
    assert checkpoint.files == ["rank-00000.safetensors", "rank-00001.safetensors"]
    checkpoint.verify_files(checkpoint.files[0::2])
    with pytest.raises(CheckpointError, match=r"no older checkpoint in .* is whole"):
        checkpoint.verify_files(checkpoint.files[1::2])
    with pytest.raises(CheckpointError, match=r"rank-00009.safetensors is not a shard file"):
        checkpoint.verify_files(["rank-00009.safetensors"])


def pipe_for(path: Path) -> None:
    """Put a pipe, which nobody writes to, in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def truncate(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 40)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda path: (path / "rank-00001.safetensors").unlink(),
        r"shard file rank-00001.safetensors is missing",
    ),
    "truncated shard": (truncate, r"rank-00000.safetensors has 40 bytes, the manifest says \d+: truncated"),
    "missing manifest": (
        lambda path: (path / "manifest.json").unlink(),
        r"manifest.json is missing: the folder is not a complete checkpoint",
    ),
    "not JSON": (lambda path: (path / "manifest.json").write_bytes(b"\x80\x04}q\x00."), r"manifest.json is not JSON"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 100), r"manifest.json is not JSON"),
    "JSON of another kind": (
        lambda path: (path / "manifest.json").write_text("[]"),
        r"is not a manifest of format 'trimaran-checkpoint'",
    ),
    "NaN": (lambda path: (path / "manifest.json").write_text("NaN"), r"NaN is not a JSON value"),
    "version": (
        lambda path: edit_manifest(path, lambda body: body.update(version=3), sign=True),
        r"format version 3, .* reads versions 1 to 2",
    ),
    "changed number": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0]["offset"].reverse(), sign=False),
        r"manifest.json does not match its own sha256",
    ),
    "file outside": (
        lambda path: edit_manifest(path, lambda body: body["files"][0].update(file="../../secret"), sign=True),
        r"not a valid manifest: files.0.file: String should match pattern",
    ),
    "range outside": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0].update(start=[11, 0]), sign=True),
        r"not a valid manifest: tensors.0: .*range \[11, 23\) does not fit in a shard of 12 elements",
    ),
    "unlisted file": (
        lambda path: edit_manifest(path, lambda body: body["files"].pop(), sign=True),
        r"files that the manifest does not list",
    ),
    "deep": (
        lambda path: (path / "manifest.json").write_text('{"format": ' + "[" * 100_000),
        r"manifest.json is not JSON \(it is nested too deep\): the file is damaged",
    ),
    "infinity": (
        lambda path: (path / "manifest.json").write_text('{"format": "trimaran-checkpoint", "version": 2, "x": 1e999}'),
        r"manifest.json is not a valid manifest: Out of range float values",
    ),
    "huge number": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0].update(start=[2**70, 0]), sign=True),
        r"not a valid manifest: tensors.0.start.0: Input should be less than",
    ),
    "columns": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0].update(dim=[0]), sign=True),
        r"the columns of 'weight' of 'w' differ in length",
    ),
    "no such dim": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0].update(dim=[2, 0]), sign=True),
        r"dim 2, offset 0, local_length 3 is no cut of global_shape \(6, 4\)",
    ),
    "holes": (
        lambda path: edit_manifest(path, lambda body: body["tensors"][0].update(length=[11, 12]), sign=True),
        r"the pieces of 'weight' of 'w' are less than its global_shape \(6, 4\)",
    ),
    "beyond its file": (
        lambda path: edit_manifest(path, lambda body: body["files"][0].update(size_bytes=40), sign=True),
        r"the pieces of a file are larger than the file",
    ),
    "twice": (
        lambda path: edit_manifest(path, lambda body: body["tensors"].append(body["tensors"][0]), sign=True),
        r"a tensor is listed twice",
    ),
    "pipe for the manifest": (
        lambda path: pipe_for(path / "manifest.json"),
        r"manifest.json cannot be read: it is a pipe, and only regular files are read",
    ),
    "renamed folder": (
        lambda path: edit_manifest(path, lambda body: body.update(step=9), sign=True),
        r"holds a manifest of step 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_older_one_is_the_latest(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, path = save_step(tmp_path, 1), save_step(tmp_path, 2)
    harm, message = DAMAGES[damage]
    harm(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(path)
    assert "step-00000002 cannot be used" in str(caught.value)
    assert "is step-00000001; move step-00000002" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == older
    assert "ignoring broken checkpoint step-00000002" in caplog.text
    assert [found.broken is None for found in find_checkpoints(tmp_path)] == [True, False]


def test_a_shard_that_contradicts_the_manifest_is_refused_even_when_all_digests_are_right(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    edit_manifest(path, lambda body: body["tensors"][0].update(dtype="bfloat16"), sign=True)
    with pytest.raises(CheckpointError, match=r"tensor 'weight\|w\|0' is not \[12\] of bfloat16 as the manifest says"):
        Checkpoint.open(path).read_global("w", "weight")


@pytest.mark.parametrize("verify", [True, False])
def test_a_pipe_in_the_place_of_a_shard_is_refused(tmp_path: Path, verify: bool) -> None:
    path = save_step(tmp_path, 1)
    pipe_for(path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors .*cannot be read \(it is a pipe, and only"):
        Checkpoint.open(path, verify=verify)


@pytest.mark.parametrize("value", ["7", 2**70, -1, 1.5, True, None, [[1]]])
def test_progress_that_is_no_number_is_refused_by_name(tmp_path: Path, value: object) -> None:
    for name in ("tokens_seen", "consumed_samples", "optimizer_steps"):
        state = {"step": 1, "tokens_seen": 1, "consumed_samples": 1, "data": "x", name: value}
        (path,) = save_ranks(tmp_path, 1, pieces_of(1, 1), state)
        with pytest.raises(
            CheckpointError, match=rf"{name} must be a whole number from 0 to 2\*\*62, got .*; no older"
        ):
            read_state(path)


@pytest.mark.parametrize("state", [{}, {"spec": None}, {"spec": [1]}, {"spec": {"model": []}}])
def test_a_state_of_another_program_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    (path,) = save_ranks(tmp_path, 1, pieces_of(1, 1), state)
    with pytest.raises(CheckpointError, match="state has no step, tokens_seen, consumed_samples, data"):
        read_state(path)
    with pytest.raises(CheckpointError, match="the spec stored in the checkpoint of step 1 can't be read"):
        spec_of(Checkpoint.open(path))


def test_a_file_that_vanishes_after_opening_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_step(tmp_path, 1))
    (tmp_path / "step-00000001" / "rank-00001.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"rank-00001.safetensors of checkpoint step-00000001 \(step 1\) is broken"
    ):
        checkpoint.read_global("w", "weight")


# --- failures while saving ------------------------------------------------------------------------------------------


def assert_all_failed(results: list[Any], gather: ThreadGather, *parts: str) -> None:
    """Every rank raised the same error, which holds `parts`, after the same number of gathers."""
    assert all(isinstance(result, CheckpointError) for result in results), results
    assert len({str(result) for result in results}) == 1
    for part in (*parts, "Earlier checkpoints are untouched"):
        assert part in str(results[0])
    assert len(set(gather.calls)) == 1


def test_a_full_disk_on_one_rank_fails_all_ranks_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    earlier = save_step(tmp_path, 1)

    def fill_disk(rank: int, call: int) -> None:
        # Before anyone writes, rank 1's file becomes /dev/full, where the kernel itself answers ENOSPC.
        if rank == 0 and call == 0:
            (tmp_path / "step-00000002.tmp" / "rank-00001.safetensors").symlink_to("/dev/full")

    gather = ThreadGather(2, fill_disk)
    results = save_ranks(tmp_path, 2, pieces_of(2), gather=gather)
    assert_all_failed(results, gather, "step 2 was not saved", "rank 1: No space left on device")
    assert names_in(tmp_path) == ["step-00000001"]
    assert held_value(earlier) == 1


def test_enospc_from_write_is_reported_with_rank_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)

    def no_space(descriptor: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gather = ThreadGather(2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", no_space)
        results = save_ranks(tmp_path, 2, pieces_of(2), gather=gather)
    assert_all_failed(results, gather, "rank 0: No space left on device", "rank 1: No space left on device")
    assert names_in(tmp_path) == ["step-00000001"]
    assert held_value(save_step(tmp_path, 2)) == 2


@pytest.mark.parametrize("function", ["write_text", "publish"])
def test_a_failure_of_the_manifest_or_the_rename_fails_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    save_step(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "the disk")

    monkeypatch.setattr(f"trimaran.runtime.checkpoint.store.{function}", fail)
    gather = ThreadGather(2)
    results = save_ranks(tmp_path, 2, pieces_of(2), gather=gather)
    assert_all_failed(results, gather, "rank 0: Disk quota exceeded (the disk)")
    assert gather.calls == [3, 3]
    assert names_in(tmp_path) == ["step-00000001"]


def test_a_checkpoints_folder_that_cannot_be_made_fails_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    gather = ThreadGather(2)
    results = save_ranks(tmp_path / "checkpoints", 2, pieces_of(2), gather=gather)
    assert_all_failed(results, gather, "rank 0: File exists")


def test_an_error_while_a_rank_makes_its_pieces_reaches_all_ranks(tmp_path: Path) -> None:
    def failing() -> Iterator[ShardPiece]:
        yield pieces_of(1)[0][0]
        raise RuntimeError("out of memory")

    gather = ThreadGather(2)
    results = save_ranks(tmp_path, 2, [[], failing()], gather=gather)  # type: ignore[list-item]
    assert_all_failed(results, gather, "rank 1: RuntimeError: out of memory")
    assert names_in(tmp_path) == []


def test_ranks_without_a_shared_folder_are_told_so(tmp_path: Path) -> None:
    pieces = pieces_of(1)

    def hide(rank: int, call: int) -> None:
        if rank == 0 and call == 0:
            (tmp_path / "step-00000001.tmp").rmdir()

    gather = ThreadGather(2, hide)
    results = save_ranks(tmp_path, 1, pieces, gather=gather)
    assert_all_failed(results, gather, "rank 1:", "must be on a file system that all ranks share")


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    gather = ThreadGather(2)
    pieces = pieces_of(1)

    def one(rank: int) -> Any:
        return save(tmp_path, 1 + rank, pieces[rank], {}, rank=rank, world_size=2, gather=gather.of(rank))

    results = run_ranks(2, one)
    assert all("the ranks save different steps: [1, 2]" in str(result) for result in results)
    assert latest(tmp_path) is None


def test_elements_with_two_owners_are_refused_by_name_and_owners(tmp_path: Path) -> None:
    first = ShardPiece("layers.0.w", "weight", torch.zeros(14), whole((6, 4)), (6, 4), 0)
    second = ShardPiece("layers.0.w", "weight", torch.zeros(12), ShardSpec("tp", 0, (6, 4), 3), (3, 4), 0)
    gather = ThreadGather(2)
    results = save_ranks(tmp_path, 1, [[first], [second]], gather=gather)
    assert_all_failed(
        results,
        gather,
        "elements of 'weight' of 'layers.0.w' are owned twice",
        "rank-00000",
        "rank-00001.safetensors (start 0, offset 3)",
    )
    assert names_in(tmp_path) == []


def test_elements_without_an_owner_are_refused_by_name_and_number(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"4 of 24 elements of 'exp_avg' of 'w' are owned by no rank"):
        save(tmp_path, 1, [ShardPiece("w", "exp_avg", torch.zeros(20), whole((6, 4)), (6, 4), 0)], {})


@pytest.mark.parametrize(
    ("piece", "rule"),
    [
        (
            ShardPiece("w", "weight", torch.zeros(4, dtype=torch.int64), whole((4,)), (4,), 0),
            "has dtype torch.int64; a checkpoint stores float32",
        ),
        (
            ShardPiece("w", "weight", torch.zeros(2, 2), whole((4,)), (4,), 0),
            r"must be 1-D and contiguous, not shape \(2, 2\)",
        ),
        (
            ShardPiece("w", "weight", torch.zeros(8)[::2], whole((4,)), (4,), 0),
            r"must be 1-D and contiguous, .* strides \(2,\)",
        ),
        (
            ShardPiece("w", "weight", torch.zeros(4), whole((4,)), (4,), 1),
            r"range \[1, 5\) does not fit in local_shape \(4,\)",
        ),
        (
            ShardPiece("w", "weight", torch.zeros(4), whole((4,)), (5,), 0),
            r"local_shape \(5,\) must equal global_shape",
        ),
    ],
)
def test_an_unusable_piece_is_refused_by_name_and_rule(tmp_path: Path, piece: ShardPiece, rule: str) -> None:
    with pytest.raises(CheckpointError, match=rf"piece 'weight' of 'w' at \d.* ?{rule}"):
        save(tmp_path, 1, [piece], {})


def test_pieces_that_disagree_on_dtype_or_shape_are_refused(tmp_path: Path) -> None:
    low = ShardPiece("w", "weight", torch.zeros(2), whole((4,)), (4,), 0)
    with pytest.raises(CheckpointError, match=r"with different dtype: \['bfloat16', 'float32'\]"):
        save(
            tmp_path,
            1,
            [low, ShardPiece("w", "weight", torch.zeros(2, dtype=torch.bfloat16), whole((4,)), (4,), 2)],
            {},
        )
    with pytest.raises(CheckpointError, match=r"with different global_shape: \[\(4,\), \(5,\)\]"):
        save(tmp_path, 1, [low, ShardPiece("w", "weight", torch.zeros(3), whole((5,)), (5,), 2)], {})
    with pytest.raises(CheckpointError, match="two pieces of this rank are both"):
        save(tmp_path, 1, [low, low], {})


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"model": object()}])
def test_state_that_is_not_json_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="state is not plain JSON"):
        save(tmp_path, 1, [], state)
    assert names_in(tmp_path) == []


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        save(tmp_path, -1, [], {})
    with pytest.raises(ValueError, match="keep_last"):
        save(tmp_path, 1, [], {}, keep_last=-1)
    with pytest.raises(ValueError, match="needs a gather"):
        save(tmp_path, 1, [], {}, world_size=2)
    with pytest.raises(ValueError, match=r"rank \(2\)"):
        save(tmp_path, 1, [], {}, rank=2, world_size=2)
    with pytest.raises(ValueError, match="gather returned 1 texts for world_size 2"):
        save(tmp_path, 1, [], {}, world_size=2, gather=lambda text: [text])


# --- kills ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it, so nothing is tidied up on the way out."""


def kill_at(call: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Count every call that changes the disk and kill before number `call`; return the list of the calls made."""
    made: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if len(made) == call:
                raise Killed
            made.append(name)
            return real(*args, **kwargs)

        return wrapper

    patch.setattr(os, "write", counted("write", os.write))
    patch.setattr(os, "fsync", counted("fsync", os.fsync))
    patch.setattr(os, "unlink", counted("unlink", os.unlink))
    patch.setattr(os, "rmdir", counted("rmdir", os.rmdir))
    patch.setattr(Path, "rename", counted("rename", Path.rename))
    patch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    return made


def save_alone(folder: Path, step: int, value: float, keep_last: int) -> None:
    save(folder, step, pieces_of(value, 1)[0], {}, keep_last=keep_last)


@pytest.mark.parametrize("new_step", [2, 3], ids=["replacing", "adding"])
def test_killed_at_any_point_the_latest_checkpoint_is_whole_and_the_next_save_tidies_up(
    tmp_path: Path, new_step: int
) -> None:
    calls, finished = 0, False
    while not finished:
        folder = tmp_path / str(calls)
        save_alone(folder, 1, 1, keep_last=2)
        save_alone(folder, 2, 2, keep_last=2)
        with pytest.MonkeyPatch.context() as patch:
            made = kill_at(calls, patch)
            try:
                save_alone(folder, new_step, 30, keep_last=2)
                finished = True
            except Killed:
                pass
        found = latest(folder)
        assert found is not None
        assert held_value(found) in ((30,) if finished else (2, 30)), (calls, made)
        assert all(held_value(path) in (1, 2, 30) for path in list_checkpoints(folder))
        save_alone(folder, 4, 4, keep_last=2)
        assert held_value(folder / "step-00000004") == 4
        assert len(names_in(folder)) == 2, (calls, made, names_in(folder))
        shutil.rmtree(folder)
        calls += 1
    assert {"write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(made)


def test_a_leftover_temporary_folder_is_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step-00000002.tmp")
    shutil.copytree(path, tmp_path / "step-00000000.pruned.tmp")
    assert latest(tmp_path) == path
    save_step(tmp_path, 3)
    assert names_in(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize(
    "name", ["step-00000002", "step-00000002.tmp", "step-00000002.old", "step-00000000.pruned.tmp"]
)
@pytest.mark.parametrize("target", ["folder", "file", "nowhere"])
def test_a_link_in_the_way_of_a_save_is_removed_and_what_it_leads_to_stays(
    tmp_path: Path, name: str, target: str
) -> None:
    folder = tmp_path / "checkpoints"
    save_step(folder, 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (folder / name).symlink_to(tmp_path / target)
    assert held_value(save_step(folder, 2)) == 2
    assert names_in(folder) == ["step-00000001", "step-00000002"]
    assert names_in(tmp_path / "folder") == ["mine"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_was_moved_and_linked_is_read_and_its_link_pruned(tmp_path: Path) -> None:
    path = save_step(tmp_path / "checkpoints", 1)
    path.rename(tmp_path / "archive")
    path.symlink_to(tmp_path / "archive")
    assert held_value(path) == 1
    save_step(tmp_path / "checkpoints", 2, keep_last=1)
    assert names_in(tmp_path / "checkpoints") == ["step-00000002"]
    assert held_value(tmp_path / "archive") == 1


# --- keeping and replacing ------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept_and_older_ones_deleted(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_step(tmp_path, step, keep_last=2)
        assert names_in(tmp_path) == [f"step-{kept:08d}" for kept in range(max(1, step - 1), step + 1)]


def test_keep_last_zero_keeps_all(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000020", "step-00000030"]


def test_the_checkpoint_just_saved_stays_even_when_its_step_is_not_the_highest(tmp_path: Path) -> None:
    for step in (100, 200):
        save_step(tmp_path, step)
    save_step(tmp_path, 50, keep_last=1)
    assert names_in(tmp_path) == ["step-00000050"]


def test_broken_folders_and_foreign_files_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    save_step(tmp_path, 3, keep_last=2)
    assert names_in(tmp_path) == ["notes.txt", "step-00000001", "step-00000002", "step-00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    results = save_ranks(tmp_path, 1, pieces_of(9, 3), {"again": True})
    assert held_value(results[0]) == 9
    assert Checkpoint.open(results[0]).state == {"again": True}
    assert names_in(tmp_path) == ["step-00000001"]


def test_an_open_checkpoint_outlives_its_replacement(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_step(tmp_path, 1))
    assert checkpoint.read_global("w", "weight")[0, 0] == 1
    save_ranks(tmp_path, 1, pieces_of(9))
    assert checkpoint.read_global("w", "weight")[0, 0] == 1


def test_a_prune_that_fails_is_logged_and_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("trimaran.runtime.checkpoint.store.prune", fail)
    with caplog.at_level(logging.WARNING):
        save_step(tmp_path, 2, keep_last=1)
    assert "could not delete old checkpoints" in caplog.text


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert list_checkpoints(tmp_path) == []


# --- no pickle ------------------------------------------------------------------------------------------------------


def test_the_room_imports_and_calls_nothing_that_unpickles() -> None:
    forbidden_modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    sources = list(Path(next(iter(room.__path__))).glob("*.py"))
    assert len(sources) >= 6
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden_modules & {alias.name.split(".")[0] for alias in node.names}, source
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden_modules, source
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("torch", "np")
            ):
                assert node.attr not in ("load", "save"), source
