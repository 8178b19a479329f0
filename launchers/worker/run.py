"""The second and third call of a rank's life (`entry.run_rank`): connect to the other ranks, and run the task."""

import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store

from trimaran.launchers.before_start import check_code, check_sinks
from trimaran.launchers.data.prepare_run import lock_run, prepare_run, try_to_report
from trimaran.launchers.env.exit_codes import exit_code_after
from trimaran.launchers.env.rank_env import RankEnv, read_env
from trimaran.launchers.rendezvous.fingerprint import check_same_everywhere, facts_of_rank
from trimaran.launchers.rendezvous.mpi import MPIWorld
from trimaran.launchers.rendezvous.store import Rendezvous, join_rendezvous, single_process
from trimaran.launchers.worker.calibrate import run_calibrate
from trimaran.launchers.worker.device import Resources, check_resources, choose_device, resources_of, threads_of_rank
from trimaran.launchers.worker.evaluate import run_evaluate
from trimaran.launchers.worker.failure_relay import FailureRelay, this_process
from trimaran.launchers.worker.generate import run_generate
from trimaran.launchers.worker.process import Rank
from trimaran.launchers.worker.process_group import join_world, leave_world
from trimaran.launchers.worker.score import run_score
from trimaran.launchers.worker.serve import run_serve
from trimaran.launchers.worker.tasks import (
    CalibrateTask,
    GenerateTask,
    ScoreTask,
    ServeTask,
    SpecFile,
    Task,
    TaskFile,
    TrainTask,
    read_task,
)
from trimaran.runtime.files import write_text
from trimaran.runtime.finetune.rl.inputs import inputs_of
from trimaran.runtime.finetune.rl.loop import train_on_rewards
from trimaran.runtime.mesh import Mesh
from trimaran.runtime.plan.brief import peak_of_run
from trimaran.runtime.signal_watch import SignalWatch
from trimaran.runtime.spec import RunSpec, check_world_size, load_spec
from trimaran.runtime.train.hardware import describe_machine
from trimaran.runtime.train.loop import train
from trimaran.runtime.train.pipeline import placement_of
from trimaran.runtime.train.samples import open_data
from trimaran.runtime.train.signals import STOPPING, StopRequest


@dataclass(frozen=True)
class Connection:
    """What a rank has once it is in the process group of the run.

    Args:
        mpi: where MPI started the ranks.
        report_folder: the run folder in which rank 0 writes the report; None where `trimaran` itself writes it.
    """

    rendezvous: Rendezvous
    task: Task
    spec: RunSpec
    mesh: Mesh
    device: torch.device
    mpi: MPIWorld | None = None
    report_folder: Path | None = None


def connect(rank: Rank, source: TaskFile | SpecFile) -> Connection:
    """Connect this rank to the others: rendezvous, failure relay, checks, process group. Every rank must call it.

    Raises:
        AddressError: rank 0 was not found.
        InconsistentRanksError: the ranks' specs, code or data differ.
    """
    rank_env = rank.env
    assert rank_env is not None, "read_env comes first"
    task, spec, folder = _read(rank, rank_env, source)
    mpi = MPIWorld(rank_env) if rank_env.launcher == "mpi" else None
    broadcast = mpi.broadcast if mpi else None
    rendezvous = join_rendezvous(rank_env, os.environ, spec.launcher, folder, broadcast, rank.address_file)
    connect_failure_relay(rank, rendezvous)
    if task is None:
        assert isinstance(source, SpecFile), "a task file has a task"
        if rank.number == 0:
            check_code(spec, allow_code=source.allow_code)
            check_sinks(spec)
            rank.lock = lock_run(folder)
            rendezvous.store.set("task", str(prepare_run(spec, folder).resolve()))
        task = read_task(Path(rendezvous.wait_for("task")))
        if spec.finetune is not None:  # the examples have decided how long the run is
            spec = load_spec(task.spec)
    mesh, device = _join(rank, rendezvous, task, spec, mpi.all_gather if mpi else rendezvous.all_gather)
    return Connection(
        rendezvous, task, spec, mesh, device, mpi, report_folder=folder if isinstance(source, SpecFile) else None
    )


def run_task(rank: Rank, connection: Connection) -> int:
    """Run the task, leave the process group and return the exit code, equal on all ranks. Every rank must call it."""
    task, spec, mesh, device = connection.task, connection.spec, connection.mesh, connection.device
    if isinstance(task, TrainTask):
        exit_code = _train(rank, task, spec, mesh, device, connection.rendezvous.store)
    elif isinstance(task, GenerateTask):
        exit_code = run_generate(task, spec, mesh, device)
    elif isinstance(task, ScoreTask):
        exit_code = run_score(task, spec, mesh, device)
    elif isinstance(task, ServeTask):
        exit_code = run_serve(task, spec, mesh, device)
    elif isinstance(task, CalibrateTask):
        exit_code = run_calibrate(task, spec, mesh, device)
    else:
        exit_code = run_evaluate(task, spec, mesh, device, connection.rendezvous.store)
    leave_world(mesh, rank.relay)
    if connection.report_folder is not None:
        store = connection.rendezvous.store
        if rank.number == 0:
            try_to_report(connection.report_folder)
            store.set("reported", "")
        store.get("reported")  # a barrier too: rank 0 writes the report before any rank exits with a code
    if connection.mpi is not None and exit_code == 0:
        connection.mpi.finalize()
    return exit_code


def run_alone(task: Task) -> int:
    """Run the task of a single rank in this process; return the exit code."""
    spec = load_spec(task.spec)
    rank = Rank(announces=False)
    rank.env = read_env({}, "single")
    check_world_size(spec, 1)
    rendezvous = single_process()
    mesh, device = _join(rank, rendezvous, task, spec, rendezvous.all_gather)
    return run_task(rank, Connection(rendezvous, task, spec, mesh, device))


def _read(rank: Rank, rank_env: RankEnv, source: TaskFile | SpecFile) -> tuple[Task | None, RunSpec, Path]:
    """Read the source, check the number of ranks, and open this rank's records.

    Returns the task (None where rank 0 has yet to write it), the spec, and a folder that all ranks share.
    """
    if isinstance(source, TaskFile):
        rank.keep_records(source.logs, source.spare)
        task = read_task(source.path)
        spec, folder = load_spec(task.spec), source.path.parent
        if isinstance(task, TrainTask) and rank.number == 0:
            rank.run = Path(spec.train.output_dir)
    else:
        task = None
        spec = load_spec(source.path, list(source.overrides))
        folder = Path(spec.train.output_dir)
    check_world_size(spec, rank_env.world_size, rank_env.size_name)
    rank.set_coordinates(spec)
    if isinstance(source, SpecFile):
        rank.keep_records(folder / "logs" / f"{rank_env.launcher}-{rank_env.start}")
    rank.keep_native_errors()
    if isinstance(task, TrainTask) or (task is None and rank_env.launcher != "slurm"):  # a batch job has a log
        rank.keep_output(Path(spec.train.output_dir) / "logs")
    return task, spec, folder


def connect_failure_relay(rank: Rank, rendezvous: Rendezvous) -> None:
    """Connect this rank to the failure relay, so that all ranks exit when one fails. Every rank must call it."""
    rank_env = rendezvous.rank_env
    if rank_env.world_size == 1:
        return
    wheres = rendezvous.all_gather(rank.where)
    rendezvous.remove_address_file()
    if rank_env.rank == 0:
        key = secrets.token_hex(16)
        listener = socket.create_server((rendezvous.address, 0), backlog=1024)
        rank.relay = FailureRelay.serve(listener, key, wheres, rank.exit_after, lambda: rank.step, rank.last_words_of)
        place = [rendezvous.address, listener.getsockname()[1], key, this_process()]
        rendezvous.store.set("failure_relay", json.dumps(place))
    else:
        address, port, key, (machine, pid) = json.loads(rendezvous.store.get("failure_relay"))
        rank_0 = (machine, pid)
        rank.relay = FailureRelay.connect(
            address, port, key, rank_env.rank, rank.exit_after, wheres[0], rank_0, rank.last_words_of
        )


def _join(
    rank: Rank, rendezvous: Rendezvous, task: Task, spec: RunSpec, all_gather: Callable[[str], list[str]]
) -> tuple[Mesh, torch.device]:
    """Check that all ranks have the same run, code and kind of device; join the process group.

    Returns the mesh and the device.
    """
    rank_env = rendezvous.rank_env
    data = task.data if isinstance(task, TrainTask) else None
    check_same_everywhere(all_gather(facts_of_rank(spec, data, rank.where)))
    if data is not None and rank_env.local_rank == 0:
        open_data(data, verify=True)  # where nodes have copies, each has its own to verify
    device = choose_device(spec.launcher.device, rank_env.local_rank, rank_env.local_world_size)
    mine = resources_of(spec, device, rank.where)
    found = [Resources(**json.loads(text)) for text in all_gather(json.dumps(asdict(mine)))]
    check_resources(found)
    torch.set_num_threads(threads_of_rank(spec, found, rank_env.rank))
    if isinstance(task, TrainTask) and rank_env.rank == 0:
        folder, names = Path(spec.train.output_dir), [each.gpu_name for each in found if each.gpu_name]
        peak = {"mfu_peak": peak_of_run(folder, names[0], spec.precision.dtype).words} if names else {}
        write_text(folder / "machine.json", json.dumps(describe_machine(names) | peak))
    placement = placement_of(spec) if isinstance(task, TrainTask) else ()
    return join_world(spec, device, rendezvous, placement), device


def _train(rank: Rank, task: TrainTask, spec: RunSpec, mesh: Mesh, device: torch.device, store: Store) -> int:
    """Train; return the exit code, the same on every rank. Collective over the world."""

    def at_step(step: int, saves: bool) -> None:
        rank.step, rank.saves = step, saves
        rank.bound_output()

    # From here on a signal lets every rank finish the step and save: a rank that died of it at once would take the
    # others with it.
    with StopRequest() as stop, SignalWatch(rank.answer):
        data = open_data(task.data)
        if spec.finetune is not None and spec.finetune.method == "rl":
            state = train_on_rewards(spec, mesh, device, inputs_of(spec, data), stop, at_step)
        else:
            state = train(spec, mesh, device, data, stop, at_step, store)
    rank.stopped_by = stop.signal_name
    if state.step >= spec.train.num_steps:
        return 0
    # Slurm's signal may have reached only some of the ranks; all must exit with the code of the same signal.
    names = {name for name in mesh.gather_text(stop.signal_name or "") if name}
    return next(exit_code_after(number) for number in STOPPING if number.name in names)
