"""The tuner on this machine: it keeps the workers of a study running, and shows how the study goes on.

Its workers end with it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from trimaran.launchers.env.exit_codes import LaunchError, Stopped
from trimaran.launchers.terminal import say, start_live
from trimaran.launchers.tune.table import line_of, live_table_of, notes_of, summary_of
from trimaran.models.fields import counted
from trimaran.runtime.files import read_text
from trimaran.runtime.folder_lock import Holder
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.signals import STOPPING
from trimaran.runtime.tune.objective import curve_of, rows_of
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.study import STUDY, Found, Study

_POLL_S: Final = 0.2
_LOOK_S: Final = 1.0
_LOOKS_SHARE: Final = 50.0
"""So many times as long as it takes to read what the running trials have done, nothing is read again."""
_MOST_DEATHS: Final = 20
"""Deaths in a row, by signals, of workers between two trials that end."""
_LAST_WORDS: Final = 400


def tune_here(plan: Plan, study: Study) -> None:
    """Run a study on this machine until nothing is left to start.

    Raises:
        Stopped: a signal came; the trials have saved.
        LaunchError: a worker can't go on.
    """
    tune = plan.tune
    devices = _devices_of_slots(plan.first_spec(), tune.parallel_trials)
    crew = _Crew(study.folder, devices)
    with _signals_raise(), _Screen(plan, study) as screen:
        try:
            while crew.look():
                screen.show()
                crew.progress = screen.num_done
                time.sleep(_POLL_S)
            screen.show()
        except Stopped as stopped:
            crew.end()
            screen.show()
            saved = f"{summary_of(study.read())}; the same command goes on"
            raise Stopped(stopped.signal_number, saved=saved) from None
        except BaseException:
            crew.end()
            raise


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Crew:
    """The workers; one that is killed is started again.

    Attributes:
        progress: trials that have ended, as far as the caller knows.
    """

    def __init__(self, folder: Path, devices: Sequence[str | None]) -> None:
        self._folder, self._devices, self.progress = folder, devices, 0
        self._deaths, self._progress_at_death = 0, 0
        self._me = Holder.here("trimaran tune", os.environ)
        (folder / "logs").mkdir(exist_ok=True)
        self._workers = {slot: self._start(slot) for slot in range(len(devices))}

    def look(self) -> bool:
        """Start workers again that were killed; return whether any runs.

        Raises:
            LaunchError: one has ended with an error, or they are killed again and again.
        """
        for slot, worker in list(self._workers.items()):
            code = worker.poll()
            if code is None:
                continue
            del self._workers[slot]
            if code > 0:
                raise LaunchError(f"a worker ended: {self._last_words(slot)}", code)
            if code < 0:
                self._count_death(slot, -code)
                self._workers[slot] = self._start(slot)
        return bool(self._workers)

    def end(self) -> None:
        """Have all workers save and leave, and wait for that."""
        for worker in self._workers.values():
            worker.terminate()
        for worker in self._workers.values():
            worker.wait()
        self._workers.clear()

    def _count_death(self, slot: int, number: int) -> None:
        if self.progress > self._progress_at_death:
            self._deaths, self._progress_at_death = 0, self.progress
        self._deaths += 1
        name = signal.Signals(number).name
        if self._deaths > _MOST_DEATHS:
            log = self._log(slot)
            raise LaunchError(f"workers were killed {self._deaths} times in a row, by {name} at last; see {log}", 1)
        say(f"a worker was killed by {name} and is started again", style="yellow")

    def _log(self, slot: int) -> Path:
        return self._folder / "logs" / f"{self._me.host}-{self._me.pid}-{slot}.log"

    def _last_words(self, slot: int) -> str:
        lines = [line for line in read_text(self._log(slot), errors="replace").splitlines() if line.strip()]
        last = lines[-1].removeprefix("error: ") if lines else "it has printed nothing"
        return f"{last[:_LAST_WORDS]} (its output is in {self._log(slot)})"

    def _start(self, slot: int) -> "subprocess.Popen[bytes]":
        """Start a worker, in a session of its own: Ctrl-C is for the tuner, which tells the workers."""
        command = [sys.executable, "-P", "-m", "trimaran.launchers.tune.worker", str(self._folder)]
        command += ["--tuner", json.dumps(asdict(self._me))]
        devices = self._devices[slot]
        environment = os.environ | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        with self._log(slot).open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )


def _devices_of_slots(spec: RunSpec, count: int) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker: an equal share of the GPUs; None where trials use none.

    Raises:
        ValueError: there are too few.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sorted(Path("/dev").glob("nvidia[0-9]*"))
    names = named.split(",") if named else [each.name.removeprefix("nvidia") for each in gpus]
    if spec.launcher.device == "cpu" or not gpus or count == 1:
        return [None] * count
    each = len(names) // count
    if each < spec.world_size:
        raise ValueError(
            f"parallel_trials is {count} and a trial has {counted(spec.world_size, 'rank')}, and this host has "
            f"{counted(len(names), 'GPU')}; lower parallel_trials, or set launcher.device to cpu"
        )
    return [",".join(names[slot * each : (slot + 1) * each]) for slot in range(count)]


class _Screen:
    """A live table on a terminal, a line for each trial that has ended elsewhere."""

    def __init__(self, plan: Plan, study: Study) -> None:
        self._plan, self._study = plan, study
        self._live: Any = None
        self._size, self._found = -1, Found(plan.tune, plan.base, ())
        self._told: set[int] = set()
        self._next_look = 0.0

    @property
    def num_done(self) -> int:
        """How many trials have ended."""
        return len(self._told)

    def __enter__(self) -> Self:
        self._read()
        self._told = {trial.number for trial in self._found.trials if trial.state != "running"}
        folder = self._study.folder
        if self._found.trials:
            say(f"going on with the study in {folder}: {summary_of(self._found)}")
        at_once = counted(self._plan.tune.parallel_trials, "trial")
        logs = folder / "logs"
        say(f"{at_once} at a time; their output is in {logs}, and `trimaran tune status {folder}` tells of all")
        self._live = start_live()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self) -> None:
        """Show what has changed."""
        changed = self._read()
        if changed:
            for trial in self._found.trials:
                if trial.state != "running" and trial.number not in self._told:
                    self._told.add(trial.number)
                    if self._live is None and trial.state != "invalid":
                        say(line_of(self._found, trial))
        begun = time.monotonic()
        if self._live is not None and (changed or begun >= self._next_look):
            self._live.update(live_table_of(self._with_curves()), refresh=True)
            now = time.monotonic()
            self._next_look = now + max(_LOOK_S, _LOOKS_SHARE * (now - begun))

    def _read(self) -> bool:
        size = (self._study.folder / STUDY).stat().st_size
        if size == self._size:
            return False
        self._size, self._found = size, self._study.read()
        return True

    def _with_curves(self) -> Found:
        """Return the study with the held-out losses of the trials that run."""
        trials = []
        for trial in self._found.trials:
            if trial.state == "running":
                with suppress(OSError, ValueError):
                    curve = curve_of(rows_of(self._study.run_folder(trial)), self._plan.spec_of(trial, {}))
                    trial = trial.model_copy(update={"curve": curve, "tokens": curve[-1].tokens if curve else 0})
            trials.append(trial)
        return Found(self._found.tune, self._found.base, tuple(trials))


def tell(found: Found) -> None:
    """Say what came of a study in all."""
    for note in notes_of(found):
        say(note)
