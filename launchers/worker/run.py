"""What a rank does once its place is known: meet the others, see that all have the same run, join the process group, do the task, and leave together."""

import json
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from trimaran.launchers.env.exit_codes import exit_code_after
from trimaran.launchers.env.rank_env import resolve
from trimaran.launchers.rendezvous.fingerprint import check_same_everywhere, facts_of_rank
from trimaran.launchers.rendezvous.mpi import MPIWorld
from trimaran.launchers.rendezvous.store import Meeting, meet
from trimaran.launchers.worker.failure_relay import Tether
from trimaran.launchers.worker.generate_task import GenerateTask, run_generate
from trimaran.launchers.worker.process import Rank, threads_per_rank
from trimaran.launchers.worker.process_group import choose_device, join_world
from trimaran.runtime.data.prepare import open_prepared
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.spec import RunSpec, check_world_size, load_spec
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.signals import STOPPING, StopRequest


class TrainTask(BaseModel):
    """Train the run of a spec file on data that was prepared before."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["train"] = "train"
    spec: Path
    data: Path


Task = TrainTask | GenerateTask


def read_task(path: Path) -> Task:
    """Read the task that the launcher, or rank 0, wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return TrainTask.model_validate(raw) if raw["kind"] == "train" else GenerateTask.model_validate(raw)


def do_task(rank: Rank, path: Path, logs: Path) -> int:
    """Do a task that `trimaran` has written, with the ranks that it has started; return the exit code. Its records go under `logs`."""
    assert rank.rank_env is not None
    rank.keep_records(logs)
    task = read_task(path)
    spec = load_spec(task.spec)
    check_world_size(spec, rank.rank_env.world_size)
    rank.take_place_in(spec)
    meeting = meet(rank.rank_env, os.environ, spec.launcher, path.parent)
    tie(rank, meeting)
    return work(rank, meeting, task, spec)


def do_spec(rank: Rank, path: Path, overrides: list[str]) -> int:
    """Train a run from its spec alone, under a launcher that is not ours; return the exit code. Rank 0 prepares it, and writes the report."""
    from trimaran.launchers.prepare_run import prepare_run, try_to_report

    assert rank.rank_env is not None
    rank_env = rank.rank_env
    spec = load_spec(path, overrides)
    check_world_size(spec, rank_env.world_size)
    rank.take_place_in(spec)
    folder = Path(spec.train.output_dir)
    rank.keep_records(folder / "logs" / f"{rank_env.launcher}-{rank_env.start}")
    world = MPIWorld(rank_env) if rank_env.launcher == "mpi" else None
    meeting = meet(rank_env, os.environ, spec.launcher, folder, world)
    tie(rank, meeting)
    if rank_env.rank == 0:
        meeting.store.set("task", str(prepare_run(spec, folder).resolve()))
    task = read_task(Path(meeting.wait_for("task")))
    exit_code = work(rank, meeting, task, spec, gather=meeting.gather if world is None else world.gather)
    if rank_env.rank == 0:
        try_to_report(folder)
        meeting.store.set("reported", "")
    meeting.store.get("reported")  # a launcher ends all ranks when one has left with a code
    if world is not None and exit_code == 0:
        world.finish()
    return exit_code


def do_alone(task: Task) -> int:
    """Do a task of one rank in this very process; return the exit code."""
    spec = load_spec(task.spec)
    rank = Rank(announces=False)
    rank.rank_env = resolve({}, "single")
    check_world_size(spec, 1)
    return work(rank, meet(rank.rank_env, {}, spec.launcher, Path()), task, spec)


def tie(rank: Rank, meeting: Meeting) -> None:
    """Tie this rank to the others, so that a failure of one ends all. Every rank must call it."""
    rank_env = meeting.rank_env
    if rank_env.world_size == 1:
        return
    wheres = meeting.gather(rank.where)
    meeting.close_door()
    if rank_env.rank == 0:
        key = secrets.token_hex(16)
        listener = socket.create_server((meeting.address, 0), backlog=1024)
        rank.tether = Tether.hold(listener, key, wheres, rank.end_with, lambda: rank.step)
        meeting.store.set("tether", json.dumps([meeting.address, listener.getsockname()[1], key]))
    else:
        address, port, key = json.loads(meeting.store.get("tether"))
        rank.tether = Tether.join(address, port, key, rank_env.rank, rank.end_with, wheres[0])


def work(
    rank: Rank, meeting: Meeting, task: Task, spec: RunSpec, gather: Callable[[str], list[str]] | None = None
) -> int:
    """Do the task with the ranks of the meeting, leave their groups together, and return the exit code.

    Args:
        gather: returns every rank's text; the meeting's own where None.

    Raises:
        InconsistentRanksError: the ranks' specs, code or data differ.
    """
    rank_env = meeting.rank_env
    facts = facts_of_rank(spec, task.data if isinstance(task, TrainTask) else None, rank.where)
    check_same_everywhere((gather or meeting.gather)(facts))
    torch.set_num_threads(threads_per_rank(spec, rank_env.local_world_size))
    device = choose_device(spec.launcher.device, rank_env.local_rank, rank_env.local_world_size)
    mesh = join_world(spec, device, meeting)
    exit_code = (
        _train(task, spec, mesh, device, rank)
        if isinstance(task, TrainTask)
        else run_generate(task, spec, mesh, device)
    )
    # A rank that exits with a code makes its launcher end the others, which must not still be writing. After an error
    # nobody comes here: leaving the groups in order would wait for peers that wait for this rank.
    mesh.gather_text("")
    if rank.tether is not None:
        rank.tether.leave()
    mesh.close()
    dist.destroy_process_group()
    return exit_code


def _train(task: TrainTask, spec: RunSpec, mesh: Mesh, device: torch.device, rank: Rank) -> int:
    """Train; return the exit code, the same on every rank. Collective over the world."""

    def at_step(step: int) -> None:
        rank.step = step

    # From here on a signal lets every rank finish the step and save: a rank that died of it at once would take the
    # others with it.
    with StopRequest() as stop:
        state = train(spec, mesh, device, open_prepared(task.data), stop, at_step)
    if state.step >= spec.train.num_steps:
        return 0
    # Slurm's signal may have reached some ranks and not others; all must say the same of why they left.
    names = {name for name in mesh.gather_text(stop.signal_name or "") if name}
    return next(exit_code_after(number) for number in STOPPING if number.name in names)
