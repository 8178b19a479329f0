"""One trial as a run on this machine: start its ranks, end it early where it is worse than others, and what came of it.

Whatever has happened to the processes before, the verdict follows from the run folder and the study alone.
"""

import errno
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from trimaran.launchers.before_start import check_code
from trimaran.launchers.data.prepare_run import prepare_run
from trimaran.launchers.env.exit_codes import LaunchError, Stopped
from trimaran.launchers.local.launch import LocalRun, launch
from trimaran.launchers.local.torch_elastic import get_ready
from trimaran.launchers.terminal import is_for_users, say, sentence
from trimaran.models.fields import counted
from trimaran.runtime.checkpoint.folder import latest, step_of
from trimaran.runtime.files import read_bytes
from trimaran.runtime.processes import usable_cores
from trimaran.runtime.spec import RunSpec
from trimaran.runtime.train.metrics import DIVERGED, Row
from trimaran.runtime.tune.objective import curve_of, figures_of, has_diverged, rows_of, with_progress
from trimaran.runtime.tune.plan import Plan
from trimaran.runtime.tune.prune import step_of_end
from trimaran.runtime.tune.study import Claim, Study, Trial

_WATCH_S: Final = 0.2
_FULL: Final = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


class DiskFull(OSError):
    """A trial could not write; it goes on when there is space."""


@dataclass(frozen=True)
class _Problem:
    """Why a start of the trial has failed, and whether another one may do better."""

    text: str
    may_pass: bool


class TrialRun:
    """A claimed trial in this process.

    Attributes:
        watch: of the start under way, None before the first.
    """

    def __init__(self, study: Study, plan: Plan, claim: Claim) -> None:
        self._study, self._plan = study, plan
        self._trial, self._folder = claim.trial, study.run_folder(claim.trial)
        self._spec = self._run_here()
        self._ends_early = plan.tune.prune.method != "none"
        self.watch: Watch | None = None

    def finish(self) -> Trial:
        """Train to the end, or until the trial is ended early or has failed too often; record and return the trial.

        Raises:
            Stopped: a signal came; the ranks have saved, and as far as the study knows the trial still runs.
            DiskFull: there is no space.
        """
        done = self._verdict(None)
        while done is None:
            saved = self._saved_step()
            problem = self._train()
            done = self._verdict(problem)
            if done is None and problem is not None:
                done = self._after_failure(problem, has_saved=self._saved_step() > saved)
        self._study.record(done)
        return done

    def _train(self) -> _Problem | None:
        spec, folder = self._spec, self._folder
        try:
            get_ready(spec, spec.world_size)
            check_code(spec, allow_code=False)
            task = prepare_run(spec, folder)
            with Watch(folder, self._step_of_end if self._ends_early else None) as self.watch:
                launch(LocalRun(spec, task, folder / "logs", keeps_logs=True))
        except Stopped:
            if self.watch is None or not self.watch.has_ended_it:
                raise
        except Exception as error:
            text = sentence(error)
            if any(words in text for words in _FULL):
                raise DiskFull(f"{text}; free some space there, then the same command goes on") from error
            if not is_for_users(error):
                raise
            # What is wrong before any rank starts is as wrong at the next start.
            return _Problem(text, may_pass=isinstance(error, LaunchError))
        return None

    def _verdict(self, problem: _Problem | None) -> Trial | None:
        """Return the trial as it has ended; None where it has not.

        Args:
            problem: why its last start has failed.
        """
        rows = rows_of(self._folder)
        end = self._step_of_end(rows) if self._ends_early else None
        trial = with_progress(self._trial, self._spec, rows, end)
        figures = figures_of(self._plan.tune.objective, trial, self._folder, rows)
        outcome: dict[str, Any]
        if end is not None:
            why = f"ended at step {end} by {self._plan.tune.prune.method}"
            outcome = {"state": "pruned", "objectives": figures, "error": why}
        elif problem is not None and DIVERGED in problem.text:
            outcome = {"state": "diverged", "error": problem.text[problem.text.index(DIVERGED) :].partition(";")[0]}
        elif has_diverged(trial):
            outcome = {"state": "diverged", "error": "a held-out loss is not finite"}
        elif self._saved_step() < self._spec.train.num_steps:
            return None
        elif figures is None:
            names = ", ".join(objective.metric for objective in self._plan.tune.objective)
            outcome = {"state": "failed", "error": f"the run has no figure for {names}"}
        else:
            outcome = {"state": "complete", "objectives": figures, "error": None}
        return trial.model_copy(update=outcome)

    def _after_failure(self, problem: _Problem, *, has_saved: bool) -> Trial | None:
        """Return the failed trial, or None where it is started again; a start that has got on is not counted."""
        attempts = self._trial.attempts + (not has_saved)
        if not problem.may_pass or attempts > self._plan.tune.max_retries + 1:
            trial = with_progress(self._trial, self._spec, rows_of(self._folder))
            return trial.model_copy(update={"state": "failed", "error": problem.text})
        say(f"trial {self._trial.number} is started again: {problem.text}", style="yellow")
        self._trial = self._trial.model_copy(update={"attempts": attempts, "error": problem.text})
        self._study.record(self._trial)
        return None

    def _step_of_end(self, rows: Sequence[Row]) -> int | None:
        mine = self._trial.model_copy(update={"curve": curve_of(rows, self._spec)})
        others = []
        for trial in self._plan.rivals_of(self._trial, self._study.read().trials):
            if trial.state == "running":
                curve = curve_of(rows_of(self._study.run_folder(trial)), self._plan.spec_of(trial, {}))
                trial = trial.model_copy(update={"curve": curve})
            others.append(trial)
        return step_of_end(self._plan.tune.prune, mine, others, self._spec.train.num_steps)

    def _saved_step(self) -> int:
        saved = latest(self._folder / "checkpoints")
        return 0 if saved is None else step_of(saved) or 0

    def _run_here(self) -> RunSpec:
        """Return the run of the trial on this machine, whose cores the trials that run at once share."""
        others = {"train.output_dir": str(self._folder), "launcher.kind": "local", "checkpoint.resume": True}
        spec = self._plan.spec_of(self._trial, others)
        if spec.launcher.threads_per_rank is None:
            at_once = 1 if "SLURM_JOB_ID" in os.environ else self._plan.tune.parallel_trials
            threads = max(1, usable_cores() // (spec.world_size * at_once))
            spec = self._plan.spec_of(self._trial, {**others, "launcher.threads_per_rank": threads})
        say(f"trial {self._trial.number} of {counted(spec.world_size, 'rank')}: {self._trial.values}")
        return spec


class Watch:
    """Looks at a run's held-out losses while its ranks train, and has this process end the run where it shall.

    Args:
        folder: of the run.
        step_of_end: says from the rows of its metrics at which step it ends, None for not; None: nothing ends it.

    Attributes:
        has_ended_it: whether the run was told to end.
    """

    def __init__(self, folder: Path, step_of_end: Callable[[Sequence[Row]], int | None] | None) -> None:
        self._file, self._folder, self._step_of_end = folder / "metrics.jsonl", folder, step_of_end
        self._closed, self.has_ended_it = threading.Event(), False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        if self._step_of_end is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._step_of_end is not None:
            self._thread.join()

    def _look(self) -> None:
        size, count = 0, 0
        while not self._closed.wait(_WATCH_S):
            try:
                if self._file.stat().st_size == size:
                    continue
                content = read_bytes(self._file)
                size, before, count = len(content), count, content.count(b'"held_out_loss"')
                if count == before or self._step_of_end is None or self._step_of_end(rows_of(self._folder)) is None:
                    continue
            except (OSError, ValueError):  # it is not there yet, or is being replaced
                continue
            self.has_ended_it = True
            os.kill(os.getpid(), signal.SIGTERM)  # the agent of the ranks passes it on to them
            return
