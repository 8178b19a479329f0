"""A worker of a study: it asks for the next trial until there is none. It stays warm: a trial starts within a second.

    python -m trimaran.launchers.tune.worker FOLDER [--tuner HOLDER]

HOLDER is the process that has started it, as JSON; a worker of a batch job has none.
"""

import argparse
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from pydantic import TypeAdapter

from trimaran.launchers.data.prepare_run import try_to_report
from trimaran.launchers.env.exit_codes import Stopped, exit_code_after, write_exit_file
from trimaran.launchers.terminal import log_to_terminal, run_main, say
from trimaran.launchers.tune.trial import TrialRun
from trimaran.runtime.folder_lock import Holder
from trimaran.runtime.processes import exit_with_parent, set_process_name
from trimaran.runtime.train.signals import STOPPING
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.study import Study

_POLL_S: Final = 0.1


def work(folder: Path, tuner: Holder | None = None) -> int:
    """Run trials until none is left; return the exit code.

    Args:
        tuner: the process that has started this one; it ends with it.

    Raises:
        DiskFull: there is no space.
    """
    parent = os.getppid()
    exit_with_parent(None if tuner is None else tuner.pid)
    set_process_name("tune-worker")
    log_to_terminal()
    study = Study(folder, os.environ, tuner)
    plan = Plan.of_study(study.read())
    running: list[TrialRun] = []

    def stop(number: int, _: FrameType | None) -> None:
        watch = running[-1].watch if running else None
        if watch is None or not watch.has_ended_it or os.getppid() != parent:
            raise Stopped(number)

    for number in STOPPING:
        signal.signal(number, stop)
    try:
        with _reports() as reports:
            while os.getppid() == parent:
                claim = study.claim(plan.next_trials)
                if claim == "wait":
                    time.sleep(_POLL_S)
                elif claim == "none":
                    return 0
                else:
                    with claim.lock:
                        running[:] = [TrialRun(study, plan, claim)]
                        done = running[-1].finish()
                    running.clear()
                    why = f": {done.error}" if done.error else f": {done.objectives}"
                    say(f"trial {done.number} is {done.state}{why}")
                    reports.put(study.run_folder(done))
            return exit_code_after(signal.SIGTERM)
    except Stopped as stopped:
        say(str(stopped), style="yellow")
        return exit_code_after(stopped.signal_number)


@contextmanager
def _reports() -> Iterator["queue.SimpleQueue[Path | None]"]:
    """Yield a queue of run folders whose reports are written beside the next trial."""
    folders: queue.SimpleQueue[Path | None] = queue.SimpleQueue()

    def write() -> None:
        while (folder := folders.get()) is not None:
            try_to_report(folder)

    thread = threading.Thread(target=write, name="reports", daemon=True)
    thread.start()
    try:
        yield folders
    finally:
        folders.put(None)
        thread.join()


def main() -> int:
    """Entry point of a worker; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tuner", type=TypeAdapter(Holder).validate_json)
    options = parser.parse_args()
    exit_code = work(options.folder, options.tuner)
    write_exit_file(exit_code)
    return exit_code


if __name__ == "__main__":
    sys.exit(run_main(main))
