"""What a launcher starts as each rank: tie the rank to its launcher, find its place, do the task, and leave word of a failure.

    python -m trimaran.launchers.worker.entry SPEC [--set FIELD=VALUE]... [--launcher KIND]     under torchrun, srun or
    mpirun

`trimaran` itself starts `run_task_of_launcher`, in processes that are forked from one that has imported torch already.
"""

import argparse
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

from trimaran.launchers.env.rank_env import Kind, resolve
from trimaran.launchers.worker.process import Rank

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of a rank under a launcher that is not ours."""
    options = _parser().parse_args(arguments)
    be_rank(options.spec, options.overrides, options.launcher)


def be_rank(spec: Path, overrides: list[str], launcher: Literal["auto"] | Kind = "auto") -> NoReturn:
    """Train as one rank of the start that the environment describes; ends this process."""
    follow_parent()  # before the seconds that torch takes to import
    rank = Rank(announces=True)
    rank.leave(_end_of(rank, launcher, lambda: _work().do_spec(rank, spec, overrides)))


def run_spec_of_agent(spec: str, *overrides: str) -> None:
    """Train as one rank of those that an agent of ours has started; returns where the run has ended well, else ends the process."""
    _part_from_launcher()
    rank = Rank(announces=True)
    _leave_unless_well(rank, _end_of(rank, "torchrun", lambda: _work().do_spec(rank, Path(spec), list(overrides))))


def run_task_of_launcher(task: str, logs: str) -> None:
    """Do a task as one rank of those that `trimaran` has started on this machine; returns where the task has ended well, else ends the process.

    Args:
        task: the file that says what to do.
        logs: the folder of this start, in which the rank keeps its records.
    """
    _part_from_launcher()
    rank = Rank(announces=False)
    _leave_unless_well(rank, _end_of(rank, "torchrun", lambda: _work().do_task(rank, Path(task), Path(logs))))


def _end_of(rank: Rank, launcher: Literal["auto"] | Kind, do: Callable[[], int]) -> int:
    """Find the rank's place, do its work and return its exit code; an error ends the process."""
    # Until the train loop takes over, nothing is worth saving: Ctrl-C ends the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        rank.rank_env = resolve(os.environ, launcher)
        _prctl(_PR_SET_NAME, f"trimaran-{rank.number}".encode()[:15])  # for `top`, and `ps -o comm`
        return do()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks and the launcher must learn of it
        rank.fail(error)


def _work() -> ModuleType:
    """What takes torch, imported when an error of the import can be told."""
    return importlib.import_module("trimaran.launchers.worker.run")


def _leave_unless_well(rank: Rank, exit_code: int) -> None:
    if exit_code:  # torch's agent takes a return for success
        rank.leave(exit_code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trimaran.launchers.worker.entry", description="One rank of a run, under a launcher."
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="The run spec, a YAML file that every node can read.")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="Change a field."
    )
    parser.add_argument(
        "--launcher", choices=("auto", "torchrun", "mpi", "slurm"), default="auto", help="Whose environment to read."
    )
    return parser


def follow_parent() -> None:
    """If the parent, a launcher's process, is killed, a rank must not live on as an orphan: ask the kernel for SIGTERM then, which lets it save and leave."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before we could ask
        os._exit(1)


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _part_from_launcher() -> None:
    """For a forked rank: out of the terminal's reach, as Ctrl-C is for the launcher to pass on, and not to outlive the launcher, which is not its parent."""
    os.setpgid(0, 0)
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def wait() -> None:
        connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


if __name__ == "__main__":
    main()
