"""The entry points of a rank, one for each kind of launcher, and the three calls of every rank's life (`run_rank`).

    python -m trimaran.launchers.worker SPEC [--set FIELD=VALUE]... [--launcher KIND]

is a rank under torchrun, srun or mpirun. `trimaran` itself forks its ranks from a process that has imported torch.
"""

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Literal, NoReturn

from trimaran.launchers.env.exit_codes import Stopped, exit_code_after
from trimaran.launchers.env.limits import raise_soft_limits
from trimaran.launchers.env.rank_env import Kind, RankEnv, read_env
from trimaran.launchers.rendezvous.address_file import AddressFile
from trimaran.launchers.worker.process import Rank
from trimaran.launchers.worker.tasks import SpecFile, TaskFile
from trimaran.runtime.spec import load_spec

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h
_Launcher = Literal["auto"] | Kind


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one rank under another launcher, from the command line."""
    options = _parser().parse_args(arguments)
    serve_as_rank(options.spec, options.overrides, options.launcher)


def serve_as_rank(spec: Path, overrides: Sequence[str], launcher: _Launcher = "auto") -> NoReturn:
    """Train as one rank of the start that the environment describes, then exit."""
    exit_with_parent()  # before torch is imported, which takes seconds
    rank = Rank(announces=True)
    rank.exit(run_rank(rank, SpecFile(spec, overrides), launcher))


def run_spec_of_agent(spec: str, *overrides: str) -> None:
    """Train as one rank that our node agent has started; return if the run succeeded, otherwise exit."""
    _exit_with_launcher()
    rank = Rank(announces=True)
    _exit_unless_zero(rank, run_rank(rank, SpecFile(Path(spec), overrides), "torchrun"))


def run_task_of_launcher(task: str, logs: str, spare: str) -> None:
    """Run a task file as one rank that `trimaran` has started on this machine; return if it succeeded, otherwise exit.

    Args:
        task: path of the task file.
        logs: the folder of this start, in which the rank keeps its records.
        spare: a folder on another disk, for when that one is full.
    """
    _exit_with_launcher()
    rank = Rank(announces=False)
    _exit_unless_zero(rank, run_rank(rank, TaskFile(Path(task), Path(logs), Path(spare)), "torchrun"))


def run_rank(rank: Rank, source: TaskFile | SpecFile, launcher: _Launcher) -> int:
    """Read the environment, connect to the others, run the task; return the exit code. An error ends the process."""
    # Nothing is worth saving before the train loop handles signals: Ctrl-C ends the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        rank.env = read_env(os.environ, launcher)
        raise_soft_limits()
        _set_process_name(f"trimaran-{rank.number}")
        if isinstance(source, SpecFile):
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


def announce(rank_env: RankEnv, source: SpecFile) -> AddressFile | None:
    """On rank 0 of a Slurm step, show the other ranks that it lives while it imports torch; None on others."""
    if rank_env.launcher != "slurm" or rank_env.rank or rank_env.world_size == 1:
        return None
    folder = Path(load_spec(source.path, list(source.overrides)).train.output_dir)
    address_file = AddressFile(folder, rank_env.start)
    address_file.announce()
    return address_file


def exit_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent, the launcher, dies; a rank then saves and exits."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _exit_with_launcher() -> None:
    """Do the same for a forked rank, whose parent is not the launcher, and keep the terminal's signals from it.

    The launcher gets Ctrl-C and passes it on to the ranks.
    """
    os.setpgid(0, 0)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def wait_for_end() -> None:
        wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_end, name="launcher", daemon=True).start()


def _exit_unless_zero(rank: Rank, exit_code: int) -> None:
    if exit_code:  # torch's agent takes a return for success
        rank.exit(exit_code)


def _set_process_name(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trimaran.launchers.worker", description="One rank of a run, under a launcher."
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="The run spec, a YAML file that every node can read.")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="Change a field."
    )
    parser.add_argument(
        "--launcher", choices=("auto", "torchrun", "mpi", "slurm"), default="auto", help="Whose environment to read."
    )
    return parser


if __name__ == "__main__":
    main()
