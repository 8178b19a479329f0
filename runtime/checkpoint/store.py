"""Writing a checkpoint: each rank writes a safetensors file, rank 0 the manifest, and one rename publishes it."""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from trimaran.models.parallel.shard import Box, ShardPiece, num_elements
from trimaran.runtime.checkpoint.boxes import first_overlap, trim_padding, volume
from trimaran.runtime.checkpoint.files import DTYPE_NAMES, fsync_folder, write_safetensors, write_text
from trimaran.runtime.checkpoint.folder import clean_leftovers, prune, publish, step_folder
from trimaran.runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    FileRecord,
    Manifest,
    PieceRecord,
    RankIndex,
    dump_manifest,
    tensor_records,
)

logger = logging.getLogger(__name__)

Gather = Callable[[str], list[str]]
"""Collective: takes this rank's text and returns every rank's text in rank order, on every rank (an all-gather)."""

_MAX_PROBLEMS = 5


def save(
    folder: Path,
    step: int,
    pieces: Iterable[ShardPiece],
    state: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    keep_last: int = 0,
) -> Path:
    """Save the checkpoint of `step` and return its folder, atomically: complete or not at all.

    Collective over all `world_size` ranks. There are three phases (make the folder, write the files, publish it). Every
    rank calls `gather` once after each phase and sees the same outcomes. So a failure on any rank raises the same error
    on all of them, after the same number of calls, and no rank is left waiting. An exception of `gather` itself (a peer
    died) is passed on; the next save removes what that leaves behind.

    Args:
        folder: the run's checkpoints folder, on a file system that all ranks share; made if missing.
        step: training step; an earlier checkpoint of the same step is replaced.
        pieces: what this rank owns. Over all ranks the pieces of each (name, key) must tile its global tensor exactly
            once.
        state: plain JSON; that of rank 0 is stored.
        rank: this rank's global rank.
        world_size: number of ranks that call.
        gather: see `Gather`; may be omitted for a single rank.
        keep_last: how many of the newest checkpoints stay after this one is saved; 0 keeps all.

    Raises:
        ValueError: `rank`, `step`, `keep_last` or `gather` is not usable.
        CheckpointError: on every rank, naming the rank that failed and why; earlier checkpoints are untouched.
    """
    if step < 0 or keep_last < 0:
        raise ValueError(
            f"step ({step}) and keep_last ({keep_last}) must not be negative; keep_last 0 keeps every checkpoint"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank ({rank}) must be in [0, world_size={world_size})")
    if gather is None and world_size > 1:
        raise ValueError(f"world_size is {world_size}: save needs a gather over all ranks")
    exchange = gather or _gather_alone
    final = step_folder(folder, step)
    temporary = final.with_name(final.name + ".tmp")

    _agree(exchange, step, world_size, _attempt(step, lambda: _prepare(temporary) if rank == 0 else ""))
    try:
        indexes = _agree(exchange, step, world_size, _attempt(step, lambda: _write_rank(temporary, rank, pieces)))
        _agree(
            exchange,
            step,
            world_size,
            _attempt(step, lambda: _commit(temporary, final, step, indexes, state) if rank == 0 else ""),
        )
    except CheckpointError:
        if rank == 0:  # no rank is still writing: all of them have passed the same gather
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        _prune(folder, keep_last, final)
    return final


def save_in_parts(folder: Path, step: int, parts: Iterable[Iterable[ShardPiece]], state: Mapping[str, Any]) -> Path:
    """Save the checkpoint of `step` from this process alone, atomically, a file for each part; return its folder.

    For weights that don't fit into memory together: the next part is requested after the one before it is written. Over
    all parts the pieces of each (name, key) must tile its global tensor exactly once.

    Raises:
        CheckpointError: the pieces do not make whole tensors, or `state` is no plain JSON.
        OSError: the disk refused. An exception of `parts` is passed on. In every case nothing of the checkpoint is
            left.
    """
    final = step_folder(folder, step)
    temporary = final.with_name(final.name + ".tmp")
    _prepare(temporary)
    try:
        indexes = [_write_rank(temporary, number, part) for number, part in enumerate(parts)]
        _commit(temporary, final, step, indexes, state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _gather_alone(text: str) -> list[str]:
    return [text]


def _attempt(step: int, work: Callable[[], str]) -> str:
    """Run one phase and return its outcome as JSON. An error is returned too: this rank must still enter the gather."""
    result, failure = "", None
    try:
        result = work()
    except CheckpointError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except Exception as error:  # noqa: BLE001 - an error of any kind must reach the other ranks, who wait in gather
        failure = f"{type(error).__name__}: {error}"
    return json.dumps({"step": step, "error": failure, "result": result})


def _agree(gather: Gather, step: int, world_size: int, outcome: str) -> list[str]:
    """Exchange outcomes and return every rank's result.

    If any rank failed, raise the same CheckpointError on every rank.
    """
    outcomes = [json.loads(text) for text in gather(outcome)]
    if len(outcomes) != world_size:
        raise ValueError(
            f"gather returned {len(outcomes)} texts for world_size {world_size}; "
            "it must gather over all ranks that save"
        )
    failures = [f"rank {rank}: {each['error']}" for rank, each in enumerate(outcomes) if each["error"] is not None]
    steps = [each["step"] for each in outcomes]
    if len(set(steps)) > 1:
        failures.append(f"the ranks save different steps: {steps}")
    if failures:
        more = f" (and {len(failures) - _MAX_PROBLEMS} more)" if len(failures) > _MAX_PROBLEMS else ""
        raise CheckpointError(
            f"the checkpoint of step {step} was not saved: {'; '.join(failures[:_MAX_PROBLEMS])}{more}. "
            "Earlier checkpoints are untouched"
        )
    return [each["result"] for each in outcomes]


def _prepare(temporary: Path) -> str:
    """Make the checkpoints folder and an empty temporary folder in it; remove what killed saves left."""
    folder = temporary.parent
    if not folder.is_dir():
        folder.mkdir(parents=True)
        fsync_folder(folder.parent)
    clean_leftovers(folder)
    temporary.mkdir()
    return ""


def _write_rank(temporary: Path, rank: int, pieces: Iterable[ShardPiece]) -> str:
    """Write this rank's file and return its RankIndex as JSON."""
    file = f"rank-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    records: list[PieceRecord] = []
    for piece in pieces:
        stored = stored_piece(piece, file)
        if stored is None:
            continue
        record, data = stored
        if record.tensor_key in tensors:
            raise CheckpointError(
                f"two pieces of this rank are both {record.tensor_key!r}: a (name, key, start) may be saved once a rank"
            )
        tensors[record.tensor_key] = data
        records.append(record)
    if not tensors:
        return RankIndex(file=None, pieces=()).model_dump_json()
    if not temporary.is_dir():
        raise CheckpointError(
            f"{temporary}, made by rank 0, is not there: the checkpoints folder must be on a "
            "file system that all ranks share"
        )
    size, digest = write_safetensors(temporary / file, tensors)
    fsync_folder(temporary)
    return RankIndex(
        file=FileRecord(file=file, size_bytes=size, sha256=digest), pieces=tuple(records)
    ).model_dump_json()


def stored_piece(piece: ShardPiece, file: str) -> tuple[PieceRecord, Tensor] | None:
    """The record and the data of a piece without its vocabulary padding; None where the piece is all padding."""
    data, what = piece.data, f"piece {piece.key!r} of {piece.name!r} at {piece.start}"
    if data.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{what} has dtype {data.dtype}; a checkpoint stores {', '.join(DTYPE_NAMES.values())}")
    if data.dim() != 1 or not data.is_contiguous():
        raise CheckpointError(
            f"{what} must be 1-D and contiguous, not shape {tuple(data.shape)} with strides {data.stride()}"
        )
    local_shape = tuple(int(length) for length in piece.local_shape)
    stop = piece.start + data.numel()
    try:
        piece.spec.check(local_shape)
    except ValueError as error:
        raise CheckpointError(f"{what}: {error}") from error
    if piece.start < 0 or stop > num_elements(local_shape):
        raise CheckpointError(f"{what}: range [{piece.start}, {stop}) does not fit in local_shape {local_shape}")
    low, high = trim_padding(piece.spec, local_shape, piece.start, stop)
    if low == high:
        return None
    record = PieceRecord(
        name=piece.name,
        key=piece.key,
        global_shape=tuple(int(length) for length in piece.spec.global_shape),
        dim=piece.spec.dim,
        offset=piece.spec.offset,
        local_shape=local_shape,
        start=low,
        length=high - low,
        dtype=DTYPE_NAMES[data.dtype],
        file=file,
    )
    return record, data[low - piece.start : high - piece.start]


def _commit(temporary: Path, final: Path, step: int, indexes: Sequence[str], state: Mapping[str, Any]) -> str:
    """Check that the pieces of all ranks make whole tensors, write the manifest and give the folder its final name."""
    ranks = [RankIndex.model_validate_json(text) for text in indexes]
    pieces = [piece for each in ranks for piece in each.pieces]
    problems = tiling_problems(pieces)
    if problems:
        more = f" (and {len(problems) - _MAX_PROBLEMS} more)" if len(problems) > _MAX_PROBLEMS else ""
        raise CheckpointError("; ".join(problems[:_MAX_PROBLEMS]) + more)
    files = tuple(each.file for each in ranks if each.file is not None)
    manifest = Manifest(
        step=step, world_size=len(ranks), state=dict(state), files=files, tensors=tensor_records(pieces, files)
    )
    try:
        text = dump_manifest(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"state is not plain JSON: {error}") from error
    write_text(temporary / MANIFEST_NAME, text)
    fsync_folder(temporary)
    publish(temporary, final)
    return ""


def tiling_problems(pieces: Iterable[PieceRecord]) -> list[str]:
    """Why the pieces do not tile every (name, key) exactly once: different shapes or dtypes, overlaps, holes."""
    tensors: dict[tuple[str, str], list[PieceRecord]] = defaultdict(list)
    for piece in pieces:
        tensors[piece.name, piece.key].append(piece)
    problems = []
    for (name, key), group in sorted(tensors.items()):
        for field in ("global_shape", "dtype"):
            if len(values := {getattr(piece, field) for piece in group}) > 1:
                problems.append(f"{key!r} of {name!r} is given with different {field}: {sorted(values)}")
                break
        else:
            problems += _overlap_or_hole(f"{key!r} of {name!r}", group)
    return problems


def _overlap_or_hole(what: str, group: Sequence[PieceRecord]) -> list[str]:
    """One sentence on the first overlap or the number of missing elements; empty where there are none."""
    boxes: list[Box] = []
    owners: list[PieceRecord] = []
    for piece in group:
        held = piece.boxes()
        boxes += held
        owners += [piece] * len(held)
    if (pair := first_overlap(boxes)) is not None:
        first, second = (f"{owners[i].file} (start {owners[i].start}, offset {owners[i].offset})" for i in pair)
        return [f"elements of {what} are owned twice, by {first} and by {second}"]
    missing = num_elements(group[0].global_shape) - sum(volume(box) for box in boxes)
    return (
        [f"{missing} of {num_elements(group[0].global_shape)} elements of {what} are owned by no rank"]
        if missing
        else []
    )


def _prune(folder: Path, keep_last: int, newest: Path) -> None:
    """Prune. The checkpoint is saved already, so a failure here is only logged."""
    try:
        prune(folder, keep_last, newest)
    except OSError as error:
        logger.warning("could not delete old checkpoints in %s: %s", folder, error)
