"""The study: what is known of every trial, from study.jsonl and the trials' run folders. Imports no torch.

study.jsonl is one JSON object a line and only grows. Its first line has the settings of the search; every other one has
a trial as it then was, or settings that were changed, each with its time; the last line about a trial counts. Processes
of several hosts add lines under a lock; a line that was cut by a kill is dropped by the next one who adds. A trial
belongs to the process that holds the lock of its run folder, so that a process that dies leaves it to the others.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from trimaran.runtime.files import naming, open_regular, parse_json, read_json, write_text
from trimaran.runtime.folder_lock import FolderInUse, FolderLock, Holder
from trimaran.runtime.spec.errors import show
from trimaran.runtime.tune.space import as_tuples
from trimaran.runtime.tune.tune_spec import TuneSpec

STUDY: Final = "study.jsonl"
_LOCK: Final = ".study.lock"
_CLAIM: Final = "claim.json"
_MAY_CHANGE: Final = ("search.trials", "parallel_trials", "max_retries")
"""Settings that don't change what the trials so far mean."""

Value: TypeAlias = Annotated[
    bool | int | float | str | tuple[Any, ...] | dict[str, Any] | None, BeforeValidator(as_tuples)
]
"""A value of a field of the spec; a list of YAML is a tuple."""
State = Literal["running", "complete", "pruned", "diverged", "failed", "invalid"]


class CurvePoint(BaseModel):
    """A held-out loss that a trial measured while it trained."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    step: int
    tokens: Annotated[int, Field(description="Tokens seen by then.")]
    held_out_loss: Annotated[float, Field(allow_inf_nan=True)]


class Trial(BaseModel):
    """One trial: the values that it was given, and what came of it.

    Args:
        number: from 0, in the order of the proposals.
        values: by key of the space, a tuple for fields that move together.
        state: "invalid" is a combination that breaks a rule of the spec, which is never started; a trial that diverged
            is the worst of all, and one that failed has told nothing about its values.
        objectives: in the order of the objectives; None until the trial is complete. That of a pruned trial is what it
            had reached.
        folder: the run folder, relative to the study's.
        attempts: how often it was started again after a crash, plus one.
        tokens: seen by its last step.
        parameters: of its model.
        parameters_without_embeddings: those but the embeddings of tokens and positions and an untied head.
        flops: of its training until its last step.
        curve: its held-out losses in the order of the steps.
        rung: of the ladder.
        error: why it is not complete.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    number: Annotated[int, Field(ge=0)]
    values: dict[str, Value]
    state: State
    objectives: tuple[float, ...] | None = None
    folder: str
    attempts: int = 1
    tokens: int = 0
    parameters: int = 0
    parameters_without_embeddings: int = 0
    flops: float = 0.0
    curve: tuple[CurvePoint, ...] = ()
    rung: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Found:
    """What study.jsonl holds: the settings of the search, the sections of the base spec, and the trials by number.

    A number is missing where somebody has removed its lines.
    """

    tune: TuneSpec
    base: Mapping[str, Any]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Claim:
    """A trial that belongs to this process until `lock` is released; `is_resumed` where another one has begun it."""

    trial: Trial
    lock: FolderLock
    is_resumed: bool


class StudyError(ValueError):
    """The folder is not that of the study, or its file is damaged."""


class Study:
    """The study of a folder.

    Args:
        environment: the variables of Slurm and torchrun name the job of this process, see `Holder.here`.
        tuner: the process that has started this one and whose end ends it, None where that is the scheduler.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str], tuner: Holder | None = None) -> None:
        self.folder, self._environment, self._tuner = folder, environment, tuner
        self._path = folder / STUDY

    def exists(self) -> bool:
        """Return whether there is a study."""
        return self._path.exists()

    def read(self) -> Found:
        """Return what is known now; a last line that is being written is left out.

        Raises:
            StudyError: it is damaged.
        """
        with naming(self._path), open_regular(self._path) as file:
            lines = file.read().split(b"\n")
        tune: TuneSpec | None = None
        base: Mapping[str, Any] = {}
        trials: dict[int, Trial] = {}
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = parse_json(line)
                if not isinstance(record, dict) or not {"trial", "tune"} & record.keys():
                    raise ValueError("it tells of no trial and no settings")
                if "trial" in record:
                    trial = Trial.model_validate_json(json.dumps(record["trial"]))
                    trials[trial.number] = trial
                else:
                    tune = TuneSpec.model_validate(record["tune"])
                    base = record.get("base", base)
            except (ValueError, TypeError, KeyError) as error:
                rule = f"{self._path} line {number} is damaged ({_why(error)})"
                raise StudyError(f"{rule}; remove that line: what it tells is then tried again") from error
        if tune is None:
            raise StudyError(f"{self._path} does not begin with the settings of a study; choose another output_dir")
        return Found(tune, base, tuple(trials[number] for number in sorted(trials)))

    def begin(
        self, tune: TuneSpec, base: Mapping[str, Any], holds: Callable[[Trial], bool] = lambda trial: False
    ) -> list[str]:
        """Begin the study, or go on with it; return the settings that have changed since, as `trials: 10 -> 20`.

        Args:
            holds: whether a trial's values are points of the space as it is now: a grid may be widened and keeps them.

        Raises:
            StudyError: the folder has another study, or something else.
        """
        if not self.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise StudyError(f"output_dir {self.folder} is a file; choose another output_dir")
            others = sorted(each.name for each in self.folder.iterdir()) if self.folder.is_dir() else []
            others = [name for name in others if not name.startswith(".") and name != "logs"]
            if others:
                rule = f"output_dir {self.folder} has {others[0]} and no {STUDY}, so it is not the folder of a study"
                raise StudyError(f"{rule}; choose another output_dir")
            self.folder.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if not self.exists() or not self._path.stat().st_size or self._has_torn_start():
                self._append({"tune": tune.model_dump(mode="json"), "base": base})
                return []
            found = self.read()
            changes = _differences(found, tune, base)
            allowed = [f"{name}:" for name in _MAY_CHANGE]
            if tune.search.sampler == "grid" and all(map(holds, found.trials)):
                allowed.append("space.")
            refused = [change for change in changes if not change.startswith(tuple(allowed))]
            if set(found.tune.space).isdisjoint(tune.space):
                keys = ", ".join(found.tune.space)
                raise StudyError(f"output_dir {self.folder} has another study, over {keys}; choose another output_dir")
            if refused:
                shown = "\n  ".join(refused)
                rule = f"the study in {self.folder} was begun with other settings"
                raise StudyError(f"{rule}:\n  {shown}\nundo these changes, or choose another output_dir")
            if changes:
                self._append({"tune": tune.model_dump(mode="json")})
            return changes

    def claim(self, propose: Callable[[Found], Sequence[Trial]]) -> Claim | Literal["none", "wait"]:
        """Return a trial to run: one that a process which has ended has left, or the next one that is proposed.

        Args:
            propose: returns new trials: combinations that can't be started, and one that can as the last; none where
                the search is at its end.

        Returns:
            "none" where nothing is left to start; "wait" where a process is about to end and will leave its trial.
        """
        with self.locked():
            found = self.read()
            ends = False
            for trial in found.trials:
                if trial.state != "running":
                    continue
                lock = self._lock(trial)
                if lock is not None:
                    return Claim(trial, lock, is_resumed=True)
                ends = ends or self._holder_ends(trial)
            if ends:
                return "wait"
            new = propose(found)
            if not new:
                return "none"
            self._append(*({"trial": _dumped(trial)} for trial in new))
            if new[-1].state != "running":
                return "none"
            lock = self._lock(new[-1])
            assert lock is not None, f"trial {new[-1].number} is new"
            return Claim(new[-1], lock, is_resumed=False)

    def record(self, trial: Trial) -> None:
        """Write down a trial as it is now; the caller has claimed it."""
        with self.locked():
            self._append({"trial": _dumped(trial)})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from adding lines."""
        with FolderLock.of_moment(self.folder / _LOCK, "trimaran tune", self._environment):
            yield

    def run_folder(self, trial: Trial) -> Path:
        """Return the run folder of a trial."""
        return self.folder / trial.folder

    def _lock(self, trial: Trial) -> FolderLock | None:
        """Lock the run folder of a trial; None where another process has it."""
        folder = self.run_folder(trial)
        try:
            lock = FolderLock.of_run(folder, "trimaran tune", self._environment)
        except FolderInUse:
            return None
        me = Holder.here("trimaran tune", self._environment)
        holders = [asdict(each) for each in (me, self._tuner) if each is not None]
        try:
            write_text(folder / _CLAIM, json.dumps(holders))
        except BaseException:
            lock.release()
            raise
        return lock

    def _holder_ends(self, trial: Trial) -> bool:
        """Return whether the process that runs a trial, or the tuner that has started it, has ended.

        The ranks of the trial then save and leave, and hold the lock until they have.
        """
        me = Holder.here("", self._environment)
        with suppress(OSError, ValueError):
            holders = TypeAdapter(list[Holder]).validate_python(read_json(self.run_folder(trial) / _CLAIM))
            return any(holder.has_ended(me, 0.0) for holder in holders)
        return False

    def _has_torn_start(self) -> bool:
        with open_regular(self._path) as file:
            return b"\n" not in file.read()

    def _append(self, *records: Mapping[str, Any]) -> None:
        """Add lines, all or none. The caller holds the lock."""
        text = "".join(json.dumps({"time": time.time(), **record}) + "\n" for record in records).encode()
        with naming(self._path), self._path.open("ab+") as file:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)  # a line that a kill has cut
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    os.ftruncate(file.fileno(), whole)
                raise


def _why(error: Exception) -> str:
    """Return why a line can't be read, as a part of a sentence."""
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, detail['loc'])) or 'it'}: {detail['msg']}"
    return str(error).splitlines()[0]


def _dumped(trial: Trial) -> dict[str, Any]:
    return json.loads(trial.model_dump_json())  # type: ignore[no-any-return]


def _differences(found: Found, tune: TuneSpec, base: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that differs, of the base spec as `base.optimizer.lr: 0.1 -> 0.2`."""
    former, now = found.tune.model_dump(mode="json"), tune.model_dump(mode="json")
    for each, sections in ((former, found.base), (now, base)):
        each["base"] = sections
        del each["output_dir"]  # the folder may have been moved
    left, right = _flat(former), _flat(json.loads(json.dumps(now)))
    return [
        f"{path}: {show(left.get(path))} -> {show(right.get(path))}"
        for path in dict.fromkeys([*left, *right])
        if left.get(path, ...) != right.get(path, ...)
    ]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            name: each
            for key, item in value.items()
            for name, each in _flat(item, f"{path}.{key}" if path else key).items()
        }
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return {name: each for i, item in enumerate(value) for name, each in _flat(item, f"{path}[{i}]").items()}
    return {path: value}
