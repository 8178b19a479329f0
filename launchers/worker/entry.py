"""The entry points of a rank, one for each kind of launcher, and the three calls of every rank's life (`run_rank`).

    python -m trimaran.launchers.worker SPEC [--set FIELD=VALUE]... [--launcher KIND] [--allow-code]

is a rank under torchrun, srun or mpirun. `trimaran` itself forks its ranks from a process that has imported torch.
"""

import argparse
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import synchronize
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal, NoReturn

from trimaran.launchers.env.exit_codes import LaunchError, Stopped, exit_code_after
from trimaran.launchers.env.limits import raise_soft_limits
from trimaran.launchers.env.rank_env import Kind, RankEnv, read_env
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.launchers.worker.process import Rank
from trimaran.launchers.worker.tasks import SpecFile, TaskFile
from trimaran.runtime.processes import exit_with_parent, set_process_name
from trimaran.runtime.spec import load_spec

_PARENT_S = 1.0
_STEP_S = 10.0  # for the step under way, and the next one, to end when the launcher is gone
_POLL_S = 0.1
_EVENT_S = 0.01
_Launcher = Literal["auto"] | Kind


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one rank under another launcher, from the command line."""
    options = _parser().parse_args(arguments)
    # Whoever names the launcher is a batch script or mpirun of `trimaran train`, which has asked already.
    is_asked = options.allow_code or options.launcher != "auto"
    serve_as_rank(SpecFile(options.spec, options.overrides, is_asked), options.launcher)


def serve_as_rank(
    source: TaskFile | SpecFile, launcher: _Launcher = "auto", conclude: Callable[[], None] | None = None
) -> NoReturn:
    """Run a task as one rank of the start that the environment describes, then exit.

    Args:
        conclude: what rank 0 does once all ranks have succeeded.
    """
    parent = os.getppid()
    exit_with_parent()  # before torch is imported, which takes seconds
    rank = Rank(announces=True)

    def wait_for_end() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_S)

    leave_after(wait_for_end, rank)
    exit_code = run_rank(rank, source, launcher)
    if conclude is not None and exit_code == 0 and rank.number == 0:
        try:
            conclude()
        except BaseException as error:  # noqa: BLE001 - told as an error of the rank's task is
            rank.fail(error)
    rank.exit(exit_code)


def run_spec_of_agent(spec: str, *overrides: str) -> None:
    """Train as one rank that our node agent has started; return if the run succeeded, otherwise exit."""
    rank = Rank(announces=True)
    be_forked_rank(rank)
    _exit_unless_zero(rank, run_rank(rank, SpecFile(Path(spec), overrides), "torchrun"))


def run_task_of_launcher(task: str, logs: str, spare: str) -> None:
    """Run a task file as one rank that `trimaran` has started on this machine; return if it succeeded, otherwise exit.

    Args:
        task: path of the task file.
        logs: the folder of this start, in which the rank keeps its records.
        spare: a folder on another disk, for when that one is full.
    """
    rank = Rank(announces=False)
    be_forked_rank(rank)
    exit_code = run_rank(rank, TaskFile(Path(task), Path(logs), Path(spare)), "torchrun")
    if rank.stopped_by is not None:
        # The agent that has passed the signal on takes no result any more: a return would wait for it to the time-out.
        rank.exit(exit_code or exit_code_after(signal.Signals[rank.stopped_by]))
    _exit_unless_zero(rank, exit_code)


def run_rank(rank: Rank, source: TaskFile | SpecFile, launcher: _Launcher) -> int:
    """Read the environment, connect to the others, run the task; return the exit code. An error ends the process."""
    # Nothing is worth saving before the train loop handles signals: Ctrl-C ends the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        rank.env = read_env(os.environ, launcher)
        raise_soft_limits()
        set_process_name(f"trimaran-{rank.number}")
        rank.address_file = announce(rank.env, source)
        from trimaran.launchers.worker.run import connect, run_task  # torch; an error of its import is reported too

        connection = connect(rank, source)
        exit_code = run_task(rank, connection)
        rank.release_lock()
        return exit_code
    except Stopped as stopped:  # the reader of the output is gone: nothing has failed
        rank.exit(exit_code_after(stopped.signal_number))
    except BaseException as error:  # noqa: BLE001 - any error must reach the other ranks and the launcher
        rank.fail(error)


def announce(rank_env: RankEnv, source: TaskFile | SpecFile) -> AddressFile | None:
    """On rank 0 of a Slurm step, show the other ranks that it lives while it imports torch; None on others."""
    if rank_env.launcher != "slurm" or rank_env.rank or rank_env.world_size == 1:
        return None
    if isinstance(source, TaskFile):
        folder = source.path.parent
    else:
        folder = Path(load_spec(source.path, list(source.overrides)).train.output_dir)
    address_file = AddressFile(folder, rank_env.start)
    address_file.announce()
    return address_file


def be_forked_rank(rank: Rank) -> None:
    """Have a forked rank, whose parent is not the launcher, leave after it, and keep the terminal's signals from it.

    The launcher gets Ctrl-C and passes it on to the ranks. A rank that is killed after its return holds up nobody.
    """
    os.setpgid(0, 0)
    synchronize.Event.wait = wait_uncounted  # type: ignore[method-assign, assignment]
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        leave_after(lambda: wait([launcher.sentinel]), rank)


def wait_uncounted(event: synchronize.Event, timeout: float | None = None) -> bool:
    """Wait for an event of multiprocessing without being counted among those that wait for it.

    A rank that has returned waits until torch's agent has seen that all have. `Event.set` waits until each process that
    is counted has woken: for ever for one that was killed meanwhile, and with it the run.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while not event._flag.get_value():  # type: ignore[attr-defined]
        if end is not None and time.monotonic() > end:
            return False
        time.sleep(_EVENT_S)
    return True


def leave_after(wait_for_end: Callable[[], object], rank: Rank) -> None:
    """Have this rank save and exit after the launcher's end: `wait_for_end` returns then.

    A rank that is not at its save within seconds, because its step takes longer, exits without one. A save under way is
    finished. Until then the run's folder stays locked.
    """

    def leave() -> None:
        wait_for_end()
        os.kill(os.getpid(), signal.SIGTERM)
        rank.keep_lock()
        end = time.monotonic() + _STEP_S
        while rank.saves or time.monotonic() < end:
            time.sleep(_POLL_S)
        rank.fail(LaunchError(f"its launcher has ended, and the step under way did not within {_STEP_S:g} s", 1))

    threading.Thread(target=leave, name="launcher", daemon=True).start()


def _exit_unless_zero(rank: Rank, exit_code: int) -> None:
    if exit_code:  # torch's agent takes a return for success
        rank.exit(exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trimaran.launchers.worker", description="One rank of a run, under a launcher."
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="The run spec, a YAML file that every node can read.")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="Change a field."
    )
    parser.add_argument(
        "--allow-code", action="store_true", help="Let finetune.rl.rewards run the Python files that it names."
    )
    parser.add_argument(
        "--launcher", choices=("auto", "torchrun", "mpi", "slurm"), default="auto", help="Whose environment to read."
    )
    return parser


if __name__ == "__main__":
    main()
