"""What a launcher starts as each rank: tie the rank to its launcher, find its place, do the task, and leave word of a failure.

    python -m trimaran.launchers.worker SPEC [--set FIELD=VALUE]... [--launcher KIND]     under torchrun, srun or mpirun

`trimaran` itself starts `run_task_of_launcher`, in processes that are forked from one that has imported torch already.
"""

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Literal, NoReturn

from trimaran.launchers.place import Kind, Place, resolve
from trimaran.launchers.rank import Rank

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of a rank under a launcher that is not ours."""
    options = _parser().parse_args(arguments)
    follow_parent()  # before the seconds that torch takes to import
    be_rank(options.spec, options.overrides, options.launcher)


def be_rank(spec: Path, overrides: list[str], launcher: Literal["auto"] | Kind = "auto") -> NoReturn:
    """Train as one rank of the start that the environment describes; ends this process."""
    rank = Rank(announces=True)
    rank.leave(_train_from_spec(rank, spec, overrides, launcher))


def run_spec_of_agent(spec: str, *overrides: str) -> None:
    """Train as one rank of those that an agent of ours has started; returns where the run has ended well, else ends the process."""
    os.setpgid(0, 0)
    _follow_launcher()
    rank = Rank(announces=True)
    exit_code = _train_from_spec(rank, Path(spec), list(overrides), "torchrun")
    if exit_code:
        rank.leave(exit_code)


def _train_from_spec(rank: Rank, spec: Path, overrides: list[str], launcher: Literal["auto"] | Kind) -> int:
    _reset_interrupt()
    try:
        rank.place = resolve(os.environ, launcher)
        _name_process(rank.place)
        from trimaran.launchers.work import do_spec

        return do_spec(rank, spec, overrides)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks and the launcher must learn of it
        rank.fail(error)


def run_task_of_launcher(task: str, logs: str) -> None:
    """Do a task as one rank of those that `trimaran` has started on this machine; returns where the task has ended well, else ends the process.

    Args:
        task: the file that says what to do.
        logs: the folder of this start, in which the rank keeps its records.
    """
    os.setpgid(0, 0)  # out of the terminal's reach: Ctrl-C is for the launcher, which passes it on
    _follow_launcher()
    _reset_interrupt()
    rank = Rank(announces=False)
    try:
        rank.place = resolve(os.environ, "torchrun")
        _name_process(rank.place)
        rank.keep_records(Path(logs))
        from trimaran.launchers.work import do_task

        exit_code = do_task(rank, Path(task))
    except BaseException as error:  # noqa: BLE001 - as above
        rank.fail(error)
    if exit_code:
        rank.leave(exit_code)


def _reset_interrupt() -> None:
    # Until the train loop takes over, nothing is worth saving: Ctrl-C ends the rank without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trimaran.launchers.worker", description="One rank of a run, under a launcher.")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="The run spec, a YAML file that every node can read.")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="Change a field.")
    parser.add_argument("--launcher", choices=("auto", "torchrun", "mpi", "slurm"), default="auto", help="Whose environment to read.")
    return parser


def follow_parent() -> None:
    """If the parent, a launcher's process, is killed, a rank must not live on as an orphan: ask the kernel for SIGTERM then, which lets it save and leave."""
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before we could ask
        os._exit(1)


def _name_process(place: Place) -> None:
    """Show the rank in `top` and `ps -o comm`."""
    _prctl(_PR_SET_NAME, f"trimaran-{place.rank}".encode()[:15])


def _prctl(option: int, value: int | bytes) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _follow_launcher() -> None:
    """The same for a forked rank, whose parent is not the launcher."""
    launcher = multiprocessing.parent_process()
    if launcher is None:
        return

    def wait() -> None:
        connection.wait([launcher.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


if __name__ == "__main__":
    main()
